"""What a run has logged: from the Trainer itself, or from the trainer_state.json that it left."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SlothError, nearest

STATE = "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_EVAL = re.compile(r"eval_(.+)_loss")
# What we add to the entries that hold a loss: seconds, tokens trained and sampled a second, GiB, GiB, a share.
SECONDS, SPEED, SAMPLED, PEAK, PLANNED, MFU = (
    "step_seconds",
    "tokens_per_second",
    "rollout_tokens_per_second",
    "peak_memory_gib",
    "planned_memory_gib",
    "mfu",
)
PHASES = ("rollout", "sync", "reference", "reward", "loss")
"""What a step of reinforcement learning consists of, of which each has its `_seconds` in these entries."""
Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Series:
    """A logged number at the steps at which it was logged."""

    steps: list[int]
    values: list[float]

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, slots=True)
class History:
    """The log of a run, how many steps it was meant to have and how many it has had; 0 if that is not known."""

    entries: list[Entry]
    max_steps: int = 0
    step: int = 0

    def series(self, name: str) -> Series:
        """Everything finite that was logged under a name."""
        found = [(entry["step"], entry[name]) for entry in self.entries if _is_number(entry, name)]
        return Series([int(step) for step, _ in found], [float(value) for _, value in found])

    def evals(self) -> dict[str, Series]:
        """The losses of evaluation: "eval", or each by its name where `eval_dataset` is a dict of several."""
        if whole := self.series("eval_loss"):
            return {"eval": whole}
        names = dict.fromkeys(name for entry in self.entries for name in entry if _EVAL.fullmatch(name))
        found = {f"eval {name[5:-5]}": self.series(name) for name in names}
        return {name: series for name, series in found.items() if series}

    def last(self, name: str) -> float | None:
        """The last that was logged under a name."""
        values = self.series(name).values
        return values[-1] if values else None


def _is_number(entry: Entry, name: str) -> bool:
    both = entry.get("step"), entry.get(name)
    return all(isinstance(value, int | float) and math.isfinite(value) for value in both)


def read(folder: Path) -> History:
    """What lies in a run's output folder: its own trainer_state.json or a checkpoint's, whichever is further on.

    Raises SlothError where there is none, or where it cannot be read.
    """
    try:
        if not folder.is_dir():
            siblings = folder.parent.iterdir() if folder.parent.is_dir() else ()
            known = [path.name for path in siblings if path.is_dir()]
            raise SlothError(f"{folder} is no folder{nearest(folder.name, known)}")
        states = [_state(path) for path in _candidates(folder) if path.is_file()]
    except OSError as error:
        raise SlothError(f"{folder} cannot be read: {error}") from None
    if not states:
        raise SlothError(
            f"{folder} holds no {STATE}, nor a checkpoint-N folder with one; Trainer writes it with each checkpoint, "
            "and trainer.save_state() without one"
        )
    state = max(states, key=lambda state: int(state.get("global_step") or 0))
    return History(state["log_history"], int(state.get("max_steps") or 0), int(state.get("global_step") or 0))


def _candidates(folder: Path) -> Iterable[Path]:
    """Where a state may lie: in the newest checkpoint that has one, and in the folder itself."""
    steps = {int(match[1]): path for path in folder.iterdir() if (match := CHECKPOINT.fullmatch(path.name))}
    newest = next((path for _, path in sorted(steps.items(), reverse=True) if (path / STATE).is_file()), None)
    return [folder / STATE] if newest is None else [newest / STATE, folder / STATE]


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SlothError(f"{path} cannot be read: {error}") from None
    entries = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SlothError(f"{path} has no log_history, so no Trainer has written it")
    for name in ("global_step", "max_steps"):
        if not isinstance(state.get(name, 0), int | None):
            raise SlothError(f"{path} has {name} {state[name]!r}, where a number of steps is needed")
    return dict(state)

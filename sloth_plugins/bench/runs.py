"""All runs of a benchmark, one process after another: round by round, every second one in the other order."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..demo.children import run_child
from ..demo.results import applied_lines
from ..errors import SlothError
from .results import Run, Variant
from .variants import PATCHED, environment

Progress = Callable[[str, float], None]
"""Called with what runs now, and the fraction of all that is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What every run does: lengths in tokens, batches in rows, `lora_r` 0 for all weights."""

    model: str
    seq: int
    batch: int
    lora_r: int
    steps: int
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Those of a step."""
        return self.seq * self.batch

    def command(self, variant: str, output: Path) -> list[str]:
        """The command line of a run."""
        numbers = {"seq": self.seq, "batch": self.batch, "lora-r": self.lora_r, "steps": self.steps}
        flags = {"load-in-4bit": self.load_in_4bit, "gradient-checkpointing": self.gradient_checkpointing}
        return [
            *(sys.executable, "-m", f"{__package__}.child", "--model", self.model),
            *("--variant", variant, "--output", str(output)),
            *(word for name, value in numbers.items() for word in (f"--{name}", str(value))),
            *(f"--{name}" for name, is_set in flags.items() if is_set),
        ]


@dataclass(frozen=True, slots=True)
class Measured:
    """The variants with their runs, on what they ran, and the patches that were applied."""

    variants: list[Variant]
    device: str
    dtype: str
    versions: dict[str, str]
    patches: list[str]


def measure(
    task: Task, names: Sequence[str], rounds: int, select: str, logs: Path, progress: Progress = lambda name, done: None
) -> Measured:
    """Run everything; the output of each process goes to a file in `logs`.

    A variant that runs out of memory is not run again. Raises ChildFailed where a process fails otherwise, and
    SlothError for a mistake that it tells.
    """
    runs: dict[str, list[Run]] = {name: [] for name in names}
    about: dict[str, Any] = {}
    patches: list[str] = []
    for number in range(rounds):
        for place, name in enumerate(names if number % 2 == 0 else reversed(names)):
            if any(run.failed for run in runs[name]):
                continue
            label = f"{name}, round {number + 1} of {rounds}"
            done = number * len(names) + place
            log = logs / f"{name}-{number + 1}.log"

            def tell(fraction: float, label: str = label, done: int = done) -> None:
                progress(label, (done + fraction) / (rounds * len(names)))

            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "run.json"
                run_child(label, task.command(name, output), environment(name, select, os.environ), log, tell)
                result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
            if "mistake" in result:
                raise SlothError(result["mistake"])
            if "failed" in result:
                runs[name].append(Run(failed=result["failed"]))
                continue
            runs[name].append(Run(result["step_seconds"], result["losses"], result["peak_bytes"]))
            about = result
            if name == PATCHED:
                patches = [line.split()[0] for line in applied_lines(log)]
    if not about:
        raise SlothError("every variant ran out of memory; try a smaller --batch or --seq, or --gradient-checkpointing")
    variants = [Variant(name, own) for name, own in runs.items()]
    return Measured(variants, about["device"], about["dtype"], about["versions"], patches)

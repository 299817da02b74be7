"""What the parts of the experiment share: options, where things lie, lines of results, and rows of tokens.

See run.sh for what the parts are and which of README's figures they make.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Tokens of a row of calibration text.
CALIBRATION_LENGTH = 512
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def parser(text: str | None) -> argparse.ArgumentParser:
    """Options of every part."""
    made = argparse.ArgumentParser(description=text)
    made.add_argument("--work", type=Path, required=True, help="text, models and caches")
    made.add_argument("--results", type=Path, required=True, help="lines of JSON are added to it")
    return made


class Work:
    """The folders and files below `--work`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = folder / "tokenizer"
        self.calibration = folder / "calibration.txt"
        self.cache = folder / "cache"

    def model(self, name: str) -> Path:
        """A trained model's folder: seed0, or outliers."""
        return self.folder / "models" / name

    def rows(self, split: str, length: int, count: int | None = None) -> torch.Tensor:
        """Ids [n, length], int64 on the device: those of "train", "held_out", "tune" or "tune_held_out"."""
        ids = np.load(self.folder / f"{split}.npy", mmap_mode="r")
        n = len(ids) // length if count is None else min(count, len(ids) // length)
        if n == 0:
            raise SystemExit(f"{split} has {len(ids)} tokens, not one row of {length}")
        return torch.from_numpy(ids[: n * length].astype(np.int32)).view(n, length).to(DEVICE).long()


def record(file: Path, part: str, **values: Any) -> None:
    """Add a line to the results, whole, so that several processes may; and print it, without its longest parts."""
    line = json.dumps({"part": part, **values})
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(line + "\n")
    print(line if len(line) < 400 else line[:397] + "...", flush=True)


@contextmanager
def timed(file: Path, what: str, **values: Any) -> Any:
    """Record how long something took."""
    began = time.perf_counter()
    yield
    record(file, "time", what=what, seconds=round(time.perf_counter() - began, 2), **values)


def without_bars() -> None:
    """Where rich is not installed, progress goes unseen; call it before what shows progress is imported."""
    if importlib.util.find_spec("rich") is not None:
        return
    from sloth_plugins.export import progress

    @contextmanager
    def unseen(text: str, total: int) -> Any:
        yield lambda done: None

    progress.progress = unseen


def calibrated(work: Work, **options: Any) -> dict[str, Any]:
    """The options by which every part measures a model, so that one measurement serves them all."""
    return {"data": work.calibration, "cache": work.cache, "samples": 64, "length": CALIBRATION_LENGTH} | options

"""The calibration pass: forward through streamed layers, then back, with what is done kept on disk for the next run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..export.checkpoint import opened
from ..export.writing import save_shard
from .packing import Packing
from .statistics import Meter
from .streaming import Call, Linear, Streamed

# Tokens that pass a layer at once: their activations are small beside a layer's weights.
TOKENS = 4096
SEED = 0

Advance = Callable[[int], None]


class Work:
    """A folder of tensors by name, each whole once it has its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def alone(self) -> Any:
        """A context in which no other process is that uses the same folder; it waits for those that do."""
        from filelock import FileLock

        return FileLock(self.folder.with_suffix(".lock"))

    def has(self, name: str) -> bool:
        """Whether an earlier run, or this one, has written it."""
        return self._file(name).is_file()

    def write(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Put tensors, on any device, under a name."""
        self._file(name).parent.mkdir(parents=True, exist_ok=True)
        save_shard(self._file(name), {key: tensor.cpu().contiguous() for key, tensor in tensors.items()})

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """What `write` has put there, mapped from the file."""
        with opened(self._file(name)) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping, it cannot be iterated

    def drop(self, name: str) -> None:
        """Forget what is not needed any more."""
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def calibrate(streamed: Streamed, rows: torch.Tensor, packing: Packing, work: Work, advance: Advance) -> None:
    """Leave `layer-N` in `work` for each decoder layer: see `layer_statistics`.

    `rows` are ids [n, tokens]. Forward, each layer's input goes to disk; back, each layer is computed again from it
    with gradients of the log-likelihood of tokens that the model itself draws. `advance` gets the bytes of weights
    that were read; of an interrupted run what is there already.
    """
    last = len(streamed.layers)
    # The way back has begun, and has forgotten the inputs that it needs no more.
    begun = work.has(f"gradient-{last}") or any(work.has(f"layer-{index}") for index in range(last))
    hidden, calls = streamed.embed(rows)
    if not begun:
        work.write("input-0", {"hidden": hidden})
    del hidden
    for index in range(last):
        if not (begun or work.has(f"input-{index + 1}")):
            _forward(streamed, index, calls[index], work)
        advance(streamed.layer_bytes(index))
    if not begun:
        work.write(f"gradient-{last}", {"gradient": _top_gradient(streamed, work.read(f"input-{last}")["hidden"])})
        work.drop(f"input-{last}")
    for index in reversed(range(last)):
        if not work.has(f"layer-{index}"):
            _backward(streamed, index, calls[index], packing, work)
        work.drop(f"gradient-{index + 1}")
        work.drop(f"input-{index}")
        advance(streamed.layer_bytes(index))
    work.drop("gradient-0")


def layer_statistics(work: Work, index: int) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    """Of each linear of a layer its scores and bytes; and its inputs' mean squares, fp32 [columns]."""
    tensors = work.read(f"layer-{index}")
    facts: dict[str, dict[str, Any]] = json.loads(bytes(tensors.pop("facts").tolist()))
    return facts, tensors


def _forward(streamed: Streamed, index: int, call: Call, work: Work) -> None:
    hidden = work.read(f"input-{index}")["hidden"]
    with streamed.layer(index) as layer, torch.no_grad():
        out = through(streamed, layer, hidden, call)
    work.write(f"input-{index + 1}", {"hidden": out})


def _top_gradient(streamed: Streamed, hidden: torch.Tensor) -> torch.Tensor:
    """The gradient by the last layer's output of the log-likelihood of one token drawn at each position."""
    generator = torch.Generator(streamed.device).manual_seed(SEED)
    found = []
    with streamed.top() as logits:
        for row in hidden:
            entering = row[None].to(streamed.device).requires_grad_()
            logs = logits(entering).log_softmax(-1)
            drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            torch.autograd.backward(logs.gather(-1, drawn).sum())
            assert entering.grad is not None
            found.append(entering.grad.cpu())
    return torch.cat(found)


def _backward(streamed: Streamed, index: int, call: Call, packing: Packing, work: Work) -> None:
    hidden = work.read(f"input-{index}")["hidden"]
    gradient = work.read(f"gradient-{index + 1}")["gradient"]
    below = []
    with streamed.layer(index) as layer:
        linears = streamed.linears[index]
        with _metered(streamed, layer, linears, packing) as meters:
            for part, slope in zip(portions(hidden), portions(gradient), strict=True):
                entering = part.to(streamed.device).requires_grad_()
                torch.autograd.backward(streamed.call(layer, entering, call), slope.to(streamed.device))
                assert entering.grad is not None
                below.append(entering.grad.cpu())
        count = hidden.shape[0] * hidden.shape[1]
        facts = {linear.name: meters[linear.name].facts(count) for linear in linears}
        squares = {linear.name: meters[linear.name].inputs / count for linear in linears}
    work.write(f"gradient-{index}", {"gradient": torch.cat(below)})
    packed = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    work.write(f"layer-{index}", {"facts": packed} | squares)


@contextmanager
def _metered(
    streamed: Streamed, layer: torch.nn.Module, linears: list[Linear], packing: Packing
) -> Iterator[dict[str, Meter]]:
    meters = {linear.name: Meter(streamed.module_of(layer, linear), packing) for linear in linears}
    try:
        yield meters
    finally:
        for meter in meters.values():
            meter.close()


def through(streamed: Streamed, layer: torch.nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """Rows [n, tokens, width] after a layer, on the host as they came."""
    return torch.cat([streamed.call(layer, part.to(streamed.device), call).cpu() for part in portions(hidden)])


def portions(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows [n, tokens, width] in as many parts as keep `TOKENS` in each."""
    return torch.split(hidden, max(1, TOKENS // hidden.shape[1]))

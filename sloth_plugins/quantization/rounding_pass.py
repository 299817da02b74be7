"""A pass forward through streamed layers: each gets 4-bit values that suit the inputs which those before it give."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import SlothError
from ..export.formats import Rounded
from .calibration import Advance, Work, portions, through
from .packing import Packing
from .rounding import DAMPING, rounded
from .streaming import Call, Linear, Streamed

NEAREST, CALIBRATED = "nearest", "calibrated"
ROUNDINGS = (NEAREST, CALIBRATED)
# By their squares.
LIMIT = 10.0


def pass_name(kept: Collection[str]) -> str:
    """What the files of a pass are called, in which these layers stay in 16 bits."""
    facts = json.dumps([sorted(kept), DAMPING, LIMIT])
    return f"rounded-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


def round_layers(
    streamed: Streamed, rows: torch.Tensor, kept: Collection[str], packing: Packing, work: Work, advance: Advance
) -> None:
    """Leave `PASS/PATH` in `work` for each linear layer but those of `kept`: `data`, its 4-bit values.

    `rows` are ids [n, tokens]. Each layer is rounded for the inputs that it gets from the layers before it as they are
    by then. Of an interrupted run what is there is kept; `advance` gets the bytes of weights that were read.
    """
    name, last = pass_name(kept), len(streamed.layers)
    begun = next((index for index in range(last, 0, -1) if work.has(f"{name}/entering-{index}")), 0)
    hidden, calls = streamed.embed(rows)
    for index in range(last):
        if index >= begun:
            if index:
                hidden = work.read(f"{name}/entering-{index}")["hidden"]
            linears = [linear for linear in streamed.linears[index] if linear.name not in kept]
            out = _round_layer(streamed, index, linears, hidden, calls[index], packing, work, name)
            work.write(f"{name}/entering-{index + 1}", {"hidden": out})
            work.drop(f"{name}/entering-{index}")
        advance(streamed.layer_bytes(index))


def forget(work: Work) -> None:
    """Remove what passes have left, those that were never finished too, and adapters that begin as what they lost."""
    for folder in (*work.folder.glob("rounded-*"), *work.folder.glob("lora-*/rounded-*")):
        # First what says how far a pass has come: one that is half removed begins anew.
        for file in folder.glob("entering-*"):
            file.unlink()
        shutil.rmtree(folder)


def _round_layer(
    streamed: Streamed,
    index: int,
    linears: list[Linear],
    hidden: torch.Tensor,
    call: Call,
    packing: Packing,
    work: Work,
    name: str,
) -> torch.Tensor:
    """What the layer gives for `hidden` once it is rounded."""
    with streamed.layer(index) as layer, torch.no_grad():
        modules = {linear.name: streamed.module_of(layer, linear) for linear in linears}
        with _moments(modules) as moments:
            for part in portions(hidden):
                streamed.call(layer, part.to(streamed.device), call)
        for linear in linears:
            second, module = moments.of(linear.name), modules[linear.name]
            if second is not None and not bool(torch.isfinite(second).all()):
                raise SlothError(f"{linear.name} gets inputs that are not finite; the model computes NaN or infinity")
            # As it is stored, which need not be what the layer computes in; beyond the dtype's range that is said.
            stored = Rounded(packing.dtype).stored(linear.weight, streamed.weights.read(linear.weight))[linear.weight]
            weight = stored.to(streamed.device)
            packed = packing.pack(weight) if second is None else rounded(weight, second, packing)
            work.write(f"{name}/{linear.name}", {"data": packed.data})
            module.weight.data = packed.dequantised(module.weight.data)
        return through(streamed, layer, hidden, call)


def _limited(x: torch.Tensor) -> torch.Tensor:
    """Tokens x [n, columns], none of which counts for more than `LIMIT` typical ones.

    A few may be a thousand times as large. They would decide alone, and all others lose more than by nearest values.
    """
    squares = x.square().sum(1)
    limit = LIMIT * squares.median()
    return x * torch.where(squares > limit, limit / squares, 1.0).sqrt()[:, None]


class _Moments:
    """Sums of x x^T over the inputs of linear layers, once for those that get the very same tensor."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._owner: dict[str, str] = {}
        self._last: tuple[str, torch.Tensor] | None = None

    def watch(self, path: str) -> Any:
        """A hook that adds up what the layer of that path gets."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x: torch.Tensor = args[0]
            if path not in self._owner:
                before = self._last
                self._owner[path] = self._owner[before[0]] if before is not None and before[1] is x else path
            self._last = path, x
            if self._owner[path] == path:
                flat = _limited(x.flatten(0, -2).float())
                added = self._sums.get(path)
                self._sums[path] = flat.T @ flat if added is None else added.addmm_(flat.T, flat)

        return hook

    def of(self, path: str) -> torch.Tensor | None:
        """The sum [columns, columns] for a layer; None for one that got nothing."""
        owner = self._owner.get(path)
        return None if owner is None else self._sums[owner]


@contextmanager
def _moments(modules: dict[str, nn.Linear]) -> Iterator[_Moments]:
    found = _Moments()
    handles = [module.register_forward_pre_hook(found.watch(path)) for path, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()

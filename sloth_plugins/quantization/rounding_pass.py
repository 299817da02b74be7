"""A pass forward through streamed layers: each gets 4-bit values that suit the inputs which those before it give."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import SlothError
from ..export.formats import Rounded
from ..export.progress import progress
from ..export.weights import Weights
from .calibration import Advance, Work, portions, through
from .measuring import streamed_of
from .packing import Packing
from .rounding import DAMPING, Inputs, rounded
from .streaming import Call, Linear, Streamed

NEAREST, CALIBRATED = "nearest", "calibrated"
ROUNDINGS = (NEAREST, CALIBRATED)
# By their squares.
LIMIT = 10.0


def pass_name(kept: Collection[str]) -> str:
    """What the files of a pass are called, in which these layers stay in 16 bits."""
    facts = json.dumps([sorted(kept), DAMPING, LIMIT])
    return f"rounded-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


def chosen_values(
    weights: Weights,
    rows: torch.Tensor,
    paths: Iterable[str],
    kept: Collection[str],
    packing: Packing,
    place: torch.device,
    work: Work,
) -> dict[str, str]:
    """The files in `work`, by path, with the 4-bit values `data` of the linear layers `paths`, all but those of `kept`.

    What is there already is not chosen again. `rows` are ids [n, tokens].
    """
    files = {path: f"{pass_name(kept)}/{path}" for path in paths}
    if not all(work.has(file) for file in files.values()):
        streamed = streamed_of(weights, packing, place)
        with progress("choosing 4-bit values", streamed.bytes) as advance:
            round_layers(streamed, rows, kept, packing, work, advance)
    return files


def round_layers(
    streamed: Streamed, rows: torch.Tensor, kept: Collection[str], packing: Packing, work: Work, advance: Advance
) -> None:
    """Leave `PASS/PATH` in `work` for each linear layer but those of `kept`: `data`, its 4-bit values.

    `rows` are ids [n, tokens]. Each layer is rounded for the inputs that it gets from the layers before it as they are
    by then. Of an interrupted run what is there is kept; `advance` gets the bytes of weights that were read.
    """
    name, last = pass_name(kept), len(streamed.layers)
    begun = next((index for index in range(last - 1, 0, -1) if work.has(f"{name}/entering-{index}")), 0)
    hidden, calls = streamed.embed(rows)
    for index in range(last):
        if index >= begun:
            if index:
                hidden = work.read(f"{name}/entering-{index}")["hidden"]
            linears = [linear for linear in streamed.linears[index] if linear.name not in kept]
            with _rounded_layer(streamed, index, linears, hidden, calls[index], packing, work, name) as layer:
                if index + 1 < last:
                    out = through(streamed, layer, hidden, calls[index])
                    work.write(f"{name}/entering-{index + 1}", {"hidden": out})
            work.drop(f"{name}/entering-{index}")
        advance(streamed.layer_bytes(index))


def forget(work: Work, but: str | None = None) -> None:
    """Remove what passes have left, those that were never finished too; `but` names one that stays."""
    for folder in work.folder.glob("rounded-*"):
        if folder.name == but:
            continue
        # First what says how far a pass has come: one that is half removed begins anew.
        for file in folder.glob("entering-*"):
            file.unlink()
        shutil.rmtree(folder)


@contextmanager
def _rounded_layer(
    streamed: Streamed,
    index: int,
    linears: list[Linear],
    hidden: torch.Tensor,
    call: Call,
    packing: Packing,
    work: Work,
    name: str,
) -> Iterator[nn.Module]:
    """The layer within a context, rounded for `hidden`, with its values written."""
    with streamed.layer(index) as layer, torch.no_grad():
        modules = {linear.name: streamed.module_of(layer, linear) for linear in linears}
        weights = {linear.name: linear.weight for linear in linears}
        with _moments(modules) as moments:
            for part in portions(hidden):
                streamed.call(layer, part.to(streamed.device), call)
        for inputs, group in moments.groups():
            if inputs is not None and not bool(torch.isfinite(inputs.second).all()):
                raise SlothError(f"{group[0]} gets inputs that are not finite; the model computes NaN or infinity")
            plain = [_stored(streamed, weights[path], packing) for path in group]
            packed = [packing.pack(weight) for weight in plain] if inputs is None else rounded(plain, inputs, packing)
            for path, one in zip(group, packed, strict=True):
                work.write(f"{name}/{path}", {"data": one.data})
                modules[path].weight.data = one.dequantised(modules[path].weight.data)
        yield layer


def _stored(streamed: Streamed, weight: str, packing: Packing) -> torch.Tensor:
    """A weight as it is stored, which need not be what its layer computes in; beyond the dtype's range that is said."""
    stored = Rounded(packing.dtype).stored(weight, streamed.weights.read(weight))[weight]
    return stored.to(streamed.device)


def _limited(x: torch.Tensor) -> torch.Tensor:
    """Tokens x [n, columns], none of which counts for more than `LIMIT` typical ones.

    A few may be a thousand times as large. They would decide alone, and all others lose more than by nearest values.
    """
    squares = x.square().sum(1)
    limit = LIMIT * squares.median()
    return x * torch.where(squares > limit, limit / squares, 1.0).sqrt()[:, None]


class _Moments:
    """Sums of x x^T over the inputs of linear layers, once for those that get the very same tensor."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = list(paths)
        self._inputs: dict[str, Inputs] = {}
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
                if path in self._inputs:
                    self._inputs[path].add(flat)
                else:
                    self._inputs[path] = Inputs.of(flat)

        return hook

    def groups(self) -> Iterator[tuple[Inputs | None, list[str]]]:
        """The layers that got the same, with what they got; None for each that got nothing."""
        for path in self._paths:
            owner = self._owner.get(path)
            if owner is None:
                yield None, [path]
            elif owner == path:
                yield self._inputs[path], [other for other in self._paths if self._owner.get(other) == path]


@contextmanager
def _moments(modules: dict[str, nn.Linear]) -> Iterator[_Moments]:
    found = _Moments(modules)
    handles = [module.register_forward_pre_hook(found.watch(path)) for path, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()

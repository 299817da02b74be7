"""Where vLLM keeps the weights of transformers' model: the same tensors, some of them fused row by row."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .engine import base_of, renaming


class Unmapped(Exception):
    """The two models cannot have their weights in common; the text says why."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A parameter of the trained model, and the rows in vLLM's tensor that hold the same values."""

    name: str
    param: torch.nn.Parameter
    rows: torch.Tensor


def pairs(model: Any, theirs: Any) -> list[Pair]:
    """A pair for each weight of `model` under its adapter, all of them equal. Raises `Unmapped`."""
    rename, fused = renaming(theirs), _Fused(theirs)
    return [_checked(name, param, fused.rows(rename(name), param.shape)) for name, param in base_of(model)]


class _Fused:
    """vLLM's parameters, by the names that their parts have in transformers."""

    def __init__(self, model: Any) -> None:
        self._modules = {name.removesuffix(".base_layer"): module for name, module in model.named_modules()}
        # A module with an adapter comes after the one inside it; what holds the weights is the latter.
        self._modules |= {
            name.removesuffix(".base_layer"): module
            for name, module in model.named_modules()
            if name.endswith(".base_layer")
        }
        self._packed = dict(getattr(model, "packed_modules_mapping", None) or {})

    def rows(self, name: str, shape: torch.Size) -> torch.Tensor | None:
        """The part of vLLM's tensors that has this name and shape in transformers, or None."""
        path, _, parameter = name.rpartition(".")
        found = next((rows for rows in self._candidates(path, parameter, shape) if rows.shape == shape), None)
        return None if found is None else found

    def _candidates(self, path: str, parameter: str, shape: torch.Size) -> Iterator[torch.Tensor]:
        # First by its own name: what is fused in transformers too is no part of anything.
        own = getattr(self._modules.get(path), parameter, None)
        if isinstance(own, torch.Tensor) and own.dim() == len(shape):
            # A vocabulary may be padded behind.
            yield own.data[: shape[0]]
        parent, _, part = path.rpartition(".")
        for whole, parts in self._packed.items():
            module = self._modules.get(f"{parent}.{whole}")
            if part in parts and module is not None and len(parts) == len(module.output_partition_sizes):
                index = parts.index(part)
                start = sum(module.output_partition_sizes[:index])
                yield getattr(module, parameter).data[start : start + module.output_partition_sizes[index]]


def _checked(name: str, param: torch.nn.Parameter, rows: torch.Tensor | None) -> Pair:
    if rows is None:
        raise Unmapped(f"vLLM has nothing like {name}")
    if param.requires_grad:
        raise Unmapped(f"{name} is trained")
    for what in ("dtype", "device"):
        ours, theirs = getattr(param, what), getattr(rows, what)
        if ours != theirs:
            raise Unmapped(f"{name} is {ours} here and {theirs} in vLLM")
    if not torch.equal(param.data, rows):
        raise Unmapped(f"{name} has other values in vLLM")
    return Pair(name, param, rows)

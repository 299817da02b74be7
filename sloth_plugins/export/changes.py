"""What an adapter does to a tensor, computed in fp32, and a base model read with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import SlothError
from .naming import embeddings, untie


@dataclass(slots=True, kw_only=True)
class Delta:
    """One LoRA term, in the orientation of the stored weight: scaling * left [rows, r] @ right [r, columns].

    DoRA (Liu et al. 2024, arXiv:2402.09353, equation 5) has a `magnitude` as well, one value for each row where
    `norm_dim` is 1 and for each column where it is 0.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    norm_dim: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it is for."""
        return (self.left.shape[0], self.right.shape[1])

    def added_to(self, weight: torch.Tensor, unmerged: torch.Tensor) -> torch.Tensor:
        """`weight` (fp32, changed in place) with this term; DoRA takes the norm of the `unmerged` weight with it."""
        if self.magnitude is None:
            return weight.addmm_(*self._factors(), alpha=self.scaling)
        alone = torch.addmm(unmerged, *self._factors(), alpha=self.scaling)
        norm = torch.linalg.vector_norm(alone, dim=self.norm_dim, keepdim=True)
        weight.addmm_(*self._factors(), alpha=self.scaling)
        return weight.mul_(_fp32(self.magnitude).reshape(norm.shape) / norm)

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return _fp32(self.left), _fp32(self.right)


@dataclass(slots=True, kw_only=True)
class Change:
    """All that an adapter does to one tensor of the checkpoint, in this order."""

    value: torch.Tensor | None = None
    """Takes the tensor's place: a module that was trained whole."""
    deltas: list[Delta] = field(default_factory=list)
    rows: list[tuple[list[int], torch.Tensor]] = field(default_factory=list)
    """Rows that take the place of rows: trained tokens."""
    terms: list[tuple[float, torch.Tensor]] = field(default_factory=list)
    """Scaled tensors to add: the biases of adapters."""

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The changed tensor in fp32; `weight` is the caller's to give away."""
        with _exactly():
            result = _fp32(weight)
            # As PEFT's forward has it: DoRA scales what the adapters before it have made.
            several = len(self.deltas) > 1 and any(delta.magnitude is not None for delta in self.deltas)
            unmerged = result.clone() if several else result
            for delta in self.deltas:
                result = delta.added_to(result, unmerged)
            for indices, values in self.rows:
                result[torch.tensor(indices)] = _fp32(values)
            for scale, term in self.terms:
                result.add_(_fp32(term), alpha=scale)
        return result

    def equals(self, other: Change) -> bool:
        """Whether both change a tensor alike, so that tensors that were tied stay so."""
        mine, theirs = list(self._parts()), list(other._parts())
        return len(mine) == len(theirs) and all(map(_same, mine, theirs))

    def _parts(self) -> Iterator[Any]:
        yield self.value
        for delta in self.deltas:
            yield from (delta.left, delta.right, delta.scaling, delta.magnitude)
            yield None if delta.magnitude is None else delta.norm_dim
        for indices, values in self.rows:
            yield from (indices, values)
        for scale, term in self.terms:
            yield from (scale, term)


class Base(Protocol):
    """A model whose tensors can be read, without an adapter."""

    config: Any
    name: str
    """For messages: the folder or the class."""
    folder: Path | None
    """Where it lies, if it does."""
    quantization: dict[str, Any] | None
    """The bitsandbytes configuration that the config had, if any."""
    quantised: frozenset[str]
    """The names that are stored in 4 or 8 bits."""
    generation_config: Any
    """Of a live model."""

    @property
    def tied(self) -> dict[str, str]:
        """Second names of tensors, which are absent from `shapes`, with their first."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As `Weights.shapes`."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """As `Weights.read`."""
        ...


class Merged:
    """A base model with the changes of its adapters."""

    def __init__(self, base: Base, changes: Mapping[str, Change], adapter: str) -> None:
        self.base = base
        self.config = copy.deepcopy(base.config)
        self.changed = bool(changes)
        self._changes = dict(changes)
        self._sources = {name: name for name in base.shapes()}
        unchanged = Change()
        for second, first in base.tied.items():
            if self._changes.get(second, unchanged).equals(self._changes.get(first, unchanged)):
                self._changes.pop(second, None)
            else:
                self._sources[second] = first
                untie(self.config)
        self._shapes = self._checked_shapes(adapter)
        self._set_vocabulary(adapter)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As `Weights.shapes`."""
        return dict(self._shapes)

    def read(self, name: str) -> torch.Tensor:
        """As `Weights.read`."""
        change = self._changes.get(name)
        if change is None:
            return self.base.read(self._sources[name])
        start = self.base.read(self._sources[name]) if change.value is None else _own(change.value)
        return change.apply(start)

    def _checked_shapes(self, adapter: str) -> dict[str, tuple[int, ...]]:
        shapes = self.base.shapes()
        found = {name: shapes[source] for name, source in self._sources.items()}
        for name, change in self._changes.items():
            if name not in found:
                raise SlothError(
                    f"{adapter} changes {name}, which {self.base.name} does not have: it was trained on another base"
                )
            if change.value is not None:
                if tuple(change.value.shape[1:]) != found[name][1:]:
                    raise SlothError(_mismatch(adapter, name, tuple(change.value.shape), self.base.name, found[name]))
                found[name] = tuple(change.value.shape)
            for delta in change.deltas:
                if delta.shape != found[name]:
                    raise SlothError(_mismatch(adapter, name, delta.shape, self.base.name, found[name]))
            for indices, _ in change.rows:
                if indices and max(indices) >= found[name][0]:
                    raise SlothError(
                        f"{adapter} trains token {max(indices)}, and {name} of {self.base.name} has "
                        f"{found[name][0]} rows: it was trained on another base"
                    )
        return found

    def _set_vocabulary(self, adapter: str) -> None:
        """Rows may only have been added to, or taken from, the vocabulary, and then everywhere."""
        before = self.base.shapes()
        resized = {name: shape for name, shape in self._shapes.items() if shape != before[self._sources[name]]}
        if not resized:
            return
        vocabulary = [name for name in embeddings(self.config) if name in self._shapes]
        name, shape = next(iter(resized.items()))
        if not resized.keys() <= set(vocabulary):
            raise SlothError(_mismatch(adapter, name, shape, self.base.name, before[self._sources[name]]))
        rows = {self._shapes[name][0] for name in vocabulary}
        if len(rows) > 1:
            raise SlothError(
                f"{adapter} holds {name} with {shape[0]} rows, and not the other weight of the vocabulary, which has "
                f"{min(rows - {shape[0]})} in {self.base.name}; export the live model"
            )
        self.config.get_text_config().vocab_size = rows.pop()


@contextmanager
def _exactly() -> Iterator[None]:
    """Products of fp32 in fp32, whatever training has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return torch.equal(mine, theirs)
    return type(mine) is type(theirs) and bool(mine == theirs)


def _mismatch(adapter: str, name: str, mine: object, base: str, theirs: object) -> str:
    return f"{adapter} has {name} for shape {mine}, {base} has {theirs}: it was trained on another base"

"""How logits come about: hidden states, the head that projects them, and what upstream does with them elementwise."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .labels import LabelCount


class StaleLogitsError(RuntimeError):
    """Logits were asked for after something that they depend on had changed."""


def _version(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor._version


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A linear head as it was when the model ran: `weight` [V, H], `bias` [V] or None, and the dtype of its product."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.weight.shape[0]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of rows [..., H], as `torch.nn.Linear` computes them under the autocast of then."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        with torch.autocast(rows.device.type, enabled=False):
            return torch.nn.functional.linear(rows.to(self.dtype), self.weight.to(self.dtype), bias)

    def with_parameters(self, weight: torch.Tensor, bias: torch.Tensor | None) -> "Projection":
        """The same head over other tensors."""
        return Projection(weight, bias, self.dtype)


@dataclass(frozen=True, slots=True)
class Step:
    """One elementwise operation on logits (or, for `log_softmax`, one over the vocabulary), replayed as upstream did.

    `kind` is "scale" (by `factor`, or by its inverse where `divides`), "tanh", "cast" (to `dtype`) or "log_softmax"
    (in `dtype`).
    """

    kind: str
    factor: float = 1.0
    divides: bool = False
    dtype: torch.dtype | None = None

    @property
    def multiplier(self) -> float:
        """What a scale multiplies by."""
        return 1.0 / self.factor if self.divides else self.factor

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The step on real logits [..., V]."""
        if self.kind == "scale":
            return logits / self.factor if self.divides else logits * self.factor
        if self.kind == "tanh":
            return torch.tanh(logits)
        if self.kind == "cast":
            return logits.to(self.dtype)
        with torch.autocast(logits.device.type, enabled=False):
            return torch.log_softmax(logits, -1, dtype=self.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """Logits [..., V] that nobody has computed: `steps` of the `projection` of `rows` [..., H].

    `labels` is what is known of the labels that the model was called with.
    """

    rows: torch.Tensor
    projection: Projection
    steps: tuple[Step, ...] = ()
    versions: tuple[int, ...] = ()
    labels: LabelCount | None = None

    @classmethod
    def of(
        cls, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: LabelCount | None = None
    ) -> "Recipe":
        """The logits of a linear head, under the autocast that is on."""
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        versions = (_version(rows), _version(weight), _version(bias))
        return cls(rows, Projection(weight, bias, dtype), versions=versions, labels=labels)

    @property
    def shape(self) -> torch.Size:
        """Of the logits."""
        return torch.Size((*self.rows.shape[:-1], self.projection.vocabulary))

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        changed = [step.dtype for step in self.steps if step.dtype is not None]
        return changed[-1] if changed else self.projection.dtype

    def then(self, step: Step) -> "Recipe":
        """With one more step."""
        return replace(self, steps=(*self.steps, step))

    def with_steps(self, steps: tuple[Step, ...]) -> "Recipe":
        """With other steps."""
        return replace(self, steps=steps)

    def detached(self) -> "Recipe":
        """Without a graph."""
        weight, bias = self.projection.weight.detach(), self.projection.bias
        bias = None if bias is None else bias.detach()
        return replace(self, rows=self.rows.detach(), projection=self.projection.with_parameters(weight, bias))

    def of_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> "Recipe":
        """For a selection of the rows, or for rows in another arrangement."""
        self.check()
        rows = select(self.rows)
        return replace(self, rows=rows, versions=(_version(rows), *self.versions[1:]))

    def check(self) -> None:
        """Raise `StaleLogitsError` if hidden states or head were changed in place since the model ran."""
        bias = self.projection.bias
        if (_version(self.rows), _version(self.projection.weight), _version(bias)) != self.versions:
            raise StaleLogitsError(
                "logits were first read after the hidden states or lm_head had changed (by optimizer.step, for "
                "instance), and can no longer be computed as they were; read them before, or exclude the patch: "
                "SLOTH_PLUGINS=1,-*:cross_entropy"
            )

    def compute(self) -> torch.Tensor:
        """The logits, as upstream computes them."""
        self.check()
        return self.finish(self.projection(self.rows))

    def logits_of(self, rows: Any, weight: Any, bias: Any) -> torch.Tensor:
        """The logits of other rows [n, H], and of other tensors in the place of the head's."""
        return self.finish(self.projection.with_parameters(weight, bias)(rows))

    def finish(self, projected: torch.Tensor) -> torch.Tensor:
        """All steps on projected rows."""
        for step in self.steps:
            projected = step(projected)
        return projected

    def tensors(self) -> tuple[Any, ...]:
        """Rows, weight and bias: what the logits are differentiable in."""
        return self.rows, self.projection.weight, self.projection.bias

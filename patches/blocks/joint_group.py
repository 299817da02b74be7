"""Projections of one input whose weights are made for each product: into one matrix.

With the weights W [n, k] below each other, and B [n, r] with each projection's in its own rows and columns:

    y    = x W^T, rounded, + xa B^T
    [dx] = [dy | dyb] [W]            without a pass over dx for the low-rank term
                      [A]

dyb lies in columns behind dy, where whoever makes it leaves room. The forward has no such product: it would not round
before the low-rank term is added, as stock training does, and where that term is small training would differ.
"""

from collections.abc import Sequence

import torch

from ..kernels.four_bit_weight import FourBitRows
from ..kernels.ops.lora_glu import LowRank
from .group import Group, Tensor, scaled_product
from .made_weight import is_made, joint_weight
from .projection import Projection

# Rows of matrices have to begin at multiples of 16 bytes.
STEP = 8


class JointGroup(Group):
    """A `Group` whose outputs, and gradients of them, are one tensor [T, n]; with room behind it where it says so."""

    __slots__ = ("b_joint", "packed", "room")

    def __init__(self, projections: Sequence[Projection], dtype: torch.dtype) -> None:
        super().__init__(projections, dtype)
        self.room = self.r if self.r % STEP == 0 else 0
        self.packed = FourBitRows.of([p.weight for p in projections]) if len(projections) > 1 else None
        # B of all, zero where rows and columns are not of one projection.
        self.b_joint: Tensor | None = None

    def made_together(self) -> list[tuple[Projection, ...]]:
        """All at once."""
        return [self.projections]

    @property
    def gives_one(self) -> bool:
        """Yes."""
        return True

    def forward(
        self,
        x: Tensor,
        xa: Tensor | None,
        residual: Tensor | None = None,
        *,
        with_adapters: bool = True,
        out: Tensor | None = None,
    ) -> list[Tensor]:
        """One tensor [T, n] of all outputs; or `out` [T, n + room], with them in its first columns."""
        weight = self._weight()[: self.n]
        bias = self._bias()
        start, rest = (residual, None) if bias is None else (bias, residual)
        to = None if out is None else out[:, : self.n]
        y = torch.mm(x, weight.t(), out=to) if start is None else torch.addmm(start, x, weight.t(), out=to)
        if rest is not None:
            y.add_(rest)
        if with_adapters and xa is not None and self.b_joint is not None:
            y.addmm_(xa, self.b_joint.t())
        return [y if out is None else out]

    def whole_term(self, xa: Tensor | None) -> LowRank | None:
        """As a `Group`'s."""
        return None if xa is None or self.b_joint is None else LowRank(xa, self.b_joint)

    def _weight(self) -> Tensor:
        return joint_weight(self.projections, self.dtype, self.room, self.packed)

    def _bias(self) -> Tensor | None:
        biases = [p.bias for p in self.projections]
        if all(bias is None for bias in biases):
            return None
        device = next(bias.device for bias in biases if bias is not None)
        parts = [
            torch.zeros(p.shape[0], dtype=self.dtype, device=device) if p.bias is None else p.bias.to(self.dtype)
            for p in self.projections
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def low_rank_grad(self, dys: Sequence[Tensor]) -> Tensor | None:
        """dyb [T, r] of the gradient [T, n or n + room] of all outputs, in the room behind it where there is some."""
        (dy,) = dys
        if dy.shape[1] == self.n:
            return super().low_rank_grad(self._split(dy))
        dyb = dy[:, self.n :]
        if self.scale is not None and self.b_joint is not None:
            return scaled_product(dy[:, : self.n], self.b_joint, self.scale, dyb)
        found = super().low_rank_grad(self._split(dy))
        return None if found is None else dyb.copy_(found)

    def input_grad(
        self, dys: Sequence[Tensor], dyb: Tensor | None, seeds: Sequence[int], *, with_adapters: bool = True
    ) -> Tensor:
        """dx [T, k]; `dyb` is what `low_rank_grad` gave for these `dys`."""
        (dy,) = dys
        weight = self._weight()
        if dy.shape[1] > self.n and with_adapters and not self.has_dropout and self.a is not None:
            weight[self.n :].copy_(self.a)
            return torch.mm(dy, weight)
        dx = torch.mm(dy[:, : self.n], weight[: self.n])
        return self._plus_adapters(dx, dyb, seeds) if with_adapters else dx

    def adapter_grads(
        self,
        dys: Sequence[Tensor],
        dyb: Tensor | None,
        x: Tensor,
        xa: Tensor | None,
        seeds: Sequence[int],
        needs: Sequence[bool],
        *,
        da: Tensor | None = None,
        dbs: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor | None]:
        """As a `Group`'s."""
        return super().adapter_grads(self._split(dys[0]), dyb, x, xa, seeds, needs, da=da, dbs=dbs)

    def _split(self, dy: Tensor) -> list[Tensor]:
        """The columns of each projection."""
        return [dy[:, outputs] for outputs in self.outputs]


def group_of(projections: Sequence[Projection], dtype: torch.dtype) -> Group:
    """The projections of one input as the kind of group that they make."""
    return (JointGroup if all(is_made(p, dtype) for p in projections) else Group)(projections, dtype)

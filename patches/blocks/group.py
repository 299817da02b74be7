"""Projections of one input with their low-rank terms, forward and backward, as few passes over memory as products need.

For a projection with base weight W [n, k], adapter A [r, k], B [n, r] and scale s:

    y  = x W^T + xa B^T       xa  = s x A^T     the adapters of a group make xa in one product, and it is kept
    dx = dy W + dyb A         dyb = s dy B
    dA = dyb^T x              dB  = dy^T xa

The scale is in xa and dyb, where it costs nothing. With dropout, x is the dropped input in xa and dA, and the mask of
each projection is made again from its seed.

Weights that are made for each product can be made into one matrix; `joint_group` has what follows from that.
"""

from collections.abc import Sequence

import torch

from ..kernels.ops.dropout import add_dropped, dropped
from ..kernels.ops.lora_glu import MAX_RANK, LowRank
from .made_weight import base_weight, is_made
from .projection import Adapter, Projection

Tensor = torch.Tensor
# Numbers; Triton assumes nothing of strides that are no multiples of it.
ROW = 16


class Group:
    """Projections that share an input, for computing in `dtype`."""

    __slots__ = (
        "a", "adapters", "b", "cols", "dtype", "has_dropout", "is_even", "k", "n", "outputs", "projections", "r",
        "scale",
    )  # fmt: skip
    room = 0
    """Columns behind the outputs' gradient for dyb, if the product for the input's takes it from there."""

    def __init__(self, projections: Sequence[Projection], dtype: torch.dtype) -> None:
        self.projections = tuple(projections)
        self.dtype = dtype
        self.k = projections[0].shape[1]
        self.n = 0
        self.outputs: list[slice] = []
        for projection in projections:
            self.outputs.append(slice(self.n, self.n + projection.shape[0]))
            self.n += projection.shape[0]
        self.adapters = [p.adapter for p in projections]
        self.cols: list[slice] = []
        self.r = 0
        for adapter in self.adapters:
            rank = 0 if adapter is None else adapter.a.shape[0]
            self.cols.append(slice(self.r, self.r + rank))
            self.r += rank
        # Whether all projections have adapters, of one rank.
        self.is_even = self.r > 0 and len({cols.stop - cols.start for cols in self.cols}) == 1
        present = self.present()
        self.has_dropout = any(adapter.dropout > 0.0 for adapter in present)
        scales = {adapter.scale for adapter in present}
        self.scale = scales.pop() if len(scales) == 1 else None
        self.a: Tensor | None = None
        self.b: list[Tensor | None] = [None] * len(self.projections)

    @property
    def is_narrow(self) -> bool:
        """Whether a kernel can add each of its low-rank terms from one tile."""
        return all(adapter.a.shape[0] <= MAX_RANK for adapter in self.present())

    def present(self) -> list[Adapter]:
        """The adapters of those projections that have one."""
        return [adapter for adapter in self.adapters if adapter is not None]

    def parameters(self) -> list[torch.nn.Parameter]:
        """A and B of each projection that has an adapter, in order."""
        return [t for adapter in self.present() for t in (adapter.a, adapter.b)]

    @property
    def gives_one(self) -> bool:
        """Whether all outputs are one tensor, and so are their gradients."""
        return len(self.projections) == 1

    def new_outputs(self, n_rows: int, device: torch.device) -> Tensor:
        """Memory [T, n + room] for all outputs, or their gradient."""
        return torch.empty((n_rows, self.n + self.room), dtype=self.dtype, device=device)

    def made_together(self) -> list[tuple[Projection, ...]]:
        """The projections whose weights are made for each product, by what is made at once."""
        return [(p,) for p in self.projections if is_made(p, self.dtype)]

    def low_rank(self, x: Tensor, seeds: Sequence[int]) -> Tensor | None:
        """xa [T, r] of an input x [T, k]; None without adapters."""
        if self.a is None:
            return None
        xa = low_rank_rows(x.shape[0], self.r, x)
        if not self.has_dropout and self.scale is not None:
            return scaled_product(x, self.a.t(), self.scale, xa)
        for adapter, cols, seed in zip(self.adapters, self.cols, seeds, strict=True):
            if adapter is not None:
                source = dropped(x, adapter.dropout, seed) if adapter.dropout > 0.0 else x
                scaled_product(source, self.a[cols].t(), adapter.scale, xa[:, cols])
        return xa

    def forward(
        self,
        x: Tensor,
        xa: Tensor | None,
        residual: Tensor | None = None,
        *,
        with_adapters: bool = True,
        out: Tensor | None = None,
    ) -> list[Tensor]:
        """The outputs [T, n] of each projection for x [T, k], plus `residual` in the first; or one with all of them.

        Without `with_adapters` the low-rank terms are left to whoever uses the outputs.
        """
        assert out is None, "only a joint group has one place for its outputs"
        outputs = []
        for i, projection in enumerate(self.projections):
            weight = base_weight(projection, self.dtype)
            start = residual if i == 0 else None
            bias = projection.bias
            b = self.b[i] if with_adapters else None
            if bias is not None:
                y = torch.addmm(bias if bias.dtype is self.dtype else bias.to(self.dtype), x, weight.t())
                y = y if start is None else y.add_(start)
            else:
                y = torch.mm(x, weight.t()) if start is None else torch.addmm(start, x, weight.t())
            if b is not None and xa is not None:
                y.addmm_(xa[:, self.cols[i]], b.t())
            outputs.append(y)
        return outputs

    def terms(self, xa: Tensor | None) -> list[LowRank | None]:
        """xa B^T of each projection, for whoever adds it where the output is read."""
        pairs = zip(self.b, self.cols, strict=True)
        return [None if b is None or xa is None else LowRank(xa[:, cols], b) for b, cols in pairs]

    def whole_term(self, xa: Tensor | None) -> LowRank | None:
        """xa B^T of all outputs, where they are one."""
        (term,) = self.terms(xa)
        return term

    def low_rank_grad(self, dys: Sequence[Tensor]) -> Tensor | None:
        """dyb [T, r] of the outputs' gradients; None without adapters."""
        if not self.r:
            return None
        dyb = low_rank_rows(dys[0].shape[0], self.r, dys[0])
        if len(dys) == 1 and self.b[0] is not None and self.scale is not None:
            return scaled_product(dys[0], self.b[0], self.scale, dyb)
        for adapter, b, cols, dy in zip(self.adapters, self.b, self.cols, dys, strict=True):
            if adapter is not None and b is not None:
                scaled_product(dy, b, adapter.scale, dyb[:, cols])
        return dyb

    def input_grad(
        self, dys: Sequence[Tensor], dyb: Tensor | None, seeds: Sequence[int], *, with_adapters: bool = True
    ) -> Tensor:
        """dx [T, k]; without `with_adapters` only the base's part of it."""
        dx = None
        for projection, dy in zip(self.projections, dys, strict=True):
            weight = base_weight(projection, self.dtype)
            dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
        assert dx is not None, "a group has projections"
        return self._plus_adapters(dx, dyb, seeds) if with_adapters else dx

    def _plus_adapters(self, dx: Tensor, dyb: Tensor | None, seeds: Sequence[int]) -> Tensor:
        if dyb is None or self.a is None:
            return dx
        if not self.has_dropout:
            return dx.addmm_(dyb, self.a)
        for adapter, cols, seed in zip(self.adapters, self.cols, seeds, strict=True):
            if adapter is None:
                continue
            if adapter.dropout > 0.0:
                add_dropped(dx, torch.mm(dyb[:, cols], self.a[cols]), adapter.dropout, seed)
            else:
                dx.addmm_(dyb[:, cols], self.a[cols])
        return dx

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
        """Gradients of `parameters()`, None where `needs` says so.

        Those that somebody has summed already are not computed: `da` of all A [r, k], `dbs` of the B [n, r].
        """
        grads: list[Tensor | None] = []
        if dyb is None or xa is None or not any(needs):
            return [None] * len(needs)
        wanted = iter(needs)
        together: dict[torch.dtype, Tensor] = {}
        summed = [None] * len(self.adapters) if dbs is None else dbs
        for adapter, cols, dy, seed, db in zip(self.adapters, self.cols, dys, seeds, summed, strict=True):
            if adapter is None:
                continue
            of_a = of_b = None
            dtype = adapter.a.dtype
            if next(wanted):
                if adapter.dropout > 0.0:
                    of_a = _product_over_rows(dyb[:, cols], dropped(x, adapter.dropout, seed), dtype)
                else:
                    if dtype not in together:
                        together[dtype] = _product_over_rows(dyb, x, dtype) if da is None else da.to(dtype)
                    of_a = together[dtype][cols]
            if next(wanted):
                of_b = _product_over_rows(dy, xa[:, cols], adapter.b.dtype) if db is None else db.to(adapter.b.dtype)
            grads += (of_a, of_b)
        return grads


def scaled_product(x: Tensor, y: Tensor, scale: float, out: Tensor) -> Tensor:
    """Write scale * x @ y, rounded once, into `out`."""
    return torch.mm(x, y, out=out) if scale == 1.0 else torch.addmm(out, x, y, beta=0, alpha=scale, out=out)


def low_rank_rows(n_rows: int, r: int, like: Tensor) -> Tensor:
    """Memory [T, r] of the dtype of `like`, with rows that lie as `row_of` says."""
    return torch.empty((n_rows, row_of(r)), dtype=like.dtype, device=like.device)[:, :r]


def row_of(r: int) -> int:
    """Numbers from one row of a low-rank product to the next: kernels copy ahead only what begins at such multiples."""
    return -(-r // ROW) * ROW


def _product_over_rows(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a^T b for a [T, n] and b [T, m], in `dtype`; summed in fp32, and on a GPU not rounded to less on the way."""
    if a.dtype is dtype:
        return torch.mm(a.t(), b)
    return torch.mm(a.t(), b, out_dtype=dtype) if a.is_cuda else torch.mm(a.t(), b).to(dtype)

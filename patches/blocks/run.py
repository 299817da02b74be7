"""What both functions of a decoder layer know about one call of it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from ..kernels.ops.block_norm import Norm
from .adapters import AdapterCopies
from .attention import Attention
from .group import Group
from .policy import Policy

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """A decoder layer, read: groups of projections, norms, and how its pieces are joined.

    `heads` is (query heads, key heads, features of a head). `norms` are those before and after the attention and the
    MLP: (attention, attention output, mlp, mlp output), None where there is none; a parallel layer's MLP has the
    attention's. `qk_norms` are those of q and k, per head; `copies` are the groups' adapters in their dtype.
    """

    qkv: Group
    o: Group
    up: Group
    down: Group
    heads: tuple[int, int, int]
    attention_norm: Norm
    attention_output_norm: Norm | None
    mlp_norm: Norm
    mlp_output_norm: Norm | None
    qk_norms: tuple[Norm, Norm] | None
    activation: str
    is_gated: bool
    is_parallel: bool
    copies: AdapterCopies

    @property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        """All groups."""
        return self.qkv, self.o, self.up, self.down


class Meter(Protocol):
    """Measures what a planner wants to know of a layer."""

    def again(self) -> AbstractContextManager[None]:
        """Around what a backward computes again."""

    def attention(self) -> AbstractContextManager[None]:
        """Around the attention core, in the forward and again."""

    def accounted(self, *tensors: Tensor) -> None:
        """What the attention core begins and ends with, which its graph need not keep."""


class Parked(Protocol):
    """Tensors that wait elsewhere for their backward."""

    def take(self, *, keep: bool) -> list[Tensor]:
        """Them again, on the device; with `keep` not for the last time."""

    def leave(self) -> None:
        """They are used no more; their memory is somebody else's from here on."""


class Host(Protocol):
    """Memory that is not the device's."""

    def park(self, tensors: Sequence[Tensor]) -> Parked:
        """Copy tensors there."""


@dataclass(slots=True, eq=False)
class Run:
    """One call of a layer. `dtype` is what products are computed in; the residual stream may be wider.

    `seeds` are those of the dropout masks, one for each projection of the groups in order. `may_overwrite` says that
    saved tensors come back as they are, `is_differentiable` that gradients are wanted at all. `cache` is upstream's
    cache of keys and values, if it is to be filled. `meter` measures, and `host` takes the layer's input and the
    attention's output, where a planner has set them; one may forbid what holds memory between steps (`may_hold`).
    `kept`, `parked`, `recomputed` and `x` are what the attention block leaves for later, and its backward finds, under
    a policy other than KEEP.
    """

    parts: Parts
    policy: Policy
    dtype: torch.dtype
    attention: Attention
    cos: Tensor
    sin: Tensor
    seeds: dict[str, Sequence[int]]
    may_overwrite: bool
    is_differentiable: bool
    cache: Any = None
    meter: Meter | None = None
    host: Host | None = None
    may_hold: bool = True
    kept: dict[str, Any] = field(default_factory=dict)
    parked: Parked | None = None
    recomputed: dict[str, Any] | None = None
    x: Tensor | None = None

    def measured(self, what: Literal["again", "attention"]) -> AbstractContextManager[None]:
        """Within it, the meter measures this, if there is one."""
        return nullcontext() if self.meter is None else getattr(self.meter, what)()

    def release(self) -> None:
        """Let go of what was kept, once the backward has run."""
        self.kept, self.recomputed, self.parked, self.x = {}, None, None, None


def rows(x: Tensor) -> Tensor:
    """x [B, S, N] as [B * S, N] with unit stride in a row, copied only if it must be."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def stash(ctx: Any, tensors: dict[str, Any], *inputs: Tensor) -> None:
    """Save a call's inputs and the tensors among `tensors` for backward; what is no tensor stays with ctx."""
    names = [name for name, value in tensors.items() if isinstance(value, Tensor)]
    ctx.names, ctx.others = names, {name: value for name, value in tensors.items() if name not in names}
    ctx.save_for_backward(*inputs, *(tensors[name] for name in names))


def unstash(ctx: Any, n_inputs: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """(the inputs, the tensors by name) as `stash` had them."""
    saved = ctx.saved_tensors
    return saved[:n_inputs], {**ctx.others, **dict(zip(ctx.names, saved[n_inputs:], strict=True))}

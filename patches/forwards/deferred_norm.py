"""Norms of q and k that wait for the rotary embedding, so that both run in one kernel.

While the forward of an attention runs, its `q_norm` and `k_norm` return their input and are owed. The replacement of
`apply_rotary_pos_emb` settles that: it gets the same memory, transposed or not, and norms it along with the rotation.
Where anything watches or has changed the norms, they run as ever. A forward that is left with a norm owed raises.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..kernels.watched import is_watched

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class NormKind:
    """What a replaced norm computes; the names are those of `ops.rms_norm`."""

    offset: float
    cast_before_weight: bool


# By the function itself: an attribute would pass to whoever wraps it with functools.wraps.
_kinds: WeakKeyDictionary[Forward, NormKind] = WeakKeyDictionary()


def deferrable(forward: Forward, kind: NormKind) -> Forward:
    """The forward itself, declared to ask `defers` before it computes."""
    _kinds[forward] = kind
    return forward


def epsilon(norm: Any) -> float:
    """The norm's epsilon, under either of the names that upstream has for it."""
    found: float = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return found


@dataclass(slots=True, eq=False)
class _Debt:
    """A norm, and the tensor it returned as it was."""

    norm: Any
    tensor: torch.Tensor | None = None
    version: int | None = None

    def take(self, tensor: torch.Tensor) -> None:
        # Kept alive until it is settled, so that its memory cannot become another tensor's.
        self.tensor, self.version = tensor, _version(tensor)

    def is_owed_on(self, given: torch.Tensor) -> bool:
        """Whether `given` is the kept tensor, unchanged, seen as a whole and with the same last dimension."""
        kept = self.tensor
        return (
            kept is not None
            and kept.data_ptr() == given.data_ptr()
            and kept.dtype is given.dtype
            and (kept.shape[-1], kept.stride(-1)) == (given.shape[-1], given.stride(-1))
            and sorted(zip(kept.stride(), kept.shape, strict=True))
            == sorted(zip(given.stride(), given.shape, strict=True))
            and self.version == _version(given)
        )


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class Deferral:
    """The norms of q and k in one call of an attention's forward."""

    __slots__ = ("_debts", "_open", "attention", "kind")

    def __init__(self, attention: torch.nn.Module, kind: NormKind, q_norm: Any, k_norm: Any) -> None:
        self.attention = attention
        self.kind = kind
        self._debts = _Debt(q_norm), _Debt(k_norm)
        self._open = True

    def defers(self, norm: Any, tensor: torch.Tensor) -> bool:
        """Whether the norm may return the tensor as it is; the norm is then owed. At most once for each norm."""
        if self._open:
            for debt in self._debts:
                if debt.norm is norm and debt.tensor is None:
                    debt.take(tensor)
                    return True
        return False

    @property
    def is_owed(self) -> bool:
        """Whether a norm has not been made up for."""
        return any(debt.tensor is not None for debt in self._debts)

    def settle(self, q: torch.Tensor, k: torch.Tensor) -> tuple[Any | None, Any | None]:
        """The norms that the caller must now apply to q and to k, None for one that has run; later ones run at once.

        Raises RuntimeError if a norm is owed on another tensor than the one given.
        """
        owed: list[Any | None] = []
        for debt, given, name in zip(self._debts, (q, k), "qk", strict=True):
            if debt.tensor is not None and not debt.is_owed_on(given):
                raise RuntimeError(self.complaint(f"changed {name} between its norm and the rotary embedding"))
            owed.append(None if debt.tensor is None else debt.norm)
        self._open = False
        for debt in self._debts:
            debt.tensor = None
        return owed[0], owed[1]

    def complaint(self, what: str) -> str:
        """What to say about a forward that does not do what deferring relies on."""
        return (
            f"{type(self.attention).__qualname__}.forward {what}, so the two cannot run as one; "
            "exclude the patch: SLOTH_PLUGINS=...,-*:rope"
        )


_current: ContextVar[Deferral | None] = ContextVar("sloth_plugins.deferred_norm", default=None)


def defers(norm: Any, tensor: torch.Tensor) -> bool:
    """Whether a norm's forward must return its input as it is, because the rotary embedding will make up for it."""
    deferral = _current.get()
    return deferral is not None and deferral.defers(norm, tensor)


def owed() -> Deferral | None:
    """The deferral of the attention whose forward runs, if it owes a norm."""
    deferral = _current.get()
    return deferral if deferral is not None and deferral.is_owed else None


def _kind(norm: object) -> NormKind | None:
    """What a norm computes, if its forward is ours and nobody would notice that it is not run."""
    forward = getattr(type(norm), "forward", None)
    if not isinstance(norm, torch.nn.Module) or not isinstance(forward, FunctionType):
        return None
    kind, held = _kinds.get(forward), vars(norm)
    if kind is None or "forward" in held or "_hf_hook" in held or "parametrizations" in norm._modules:
        return None
    weight = getattr(norm, "weight", None)
    return kind if isinstance(weight, torch.Tensor) and weight.dim() == 1 and not is_watched(norm) else None


def _deferral(attention: torch.nn.Module) -> Deferral | None:
    q_norm, k_norm = attention._modules.get("q_norm"), attention._modules.get("k_norm")
    kind = _kind(q_norm)
    return None if kind is None or _kind(k_norm) != kind else Deferral(attention, kind, q_norm, k_norm)


def deferring(attention_forward: Forward) -> Forward:
    """An attention's forward that leaves its `q_norm` and `k_norm` to the rotary embedding inside, where it can.

    Raises RuntimeError if the forward returns without having called it.
    """

    @functools.wraps(attention_forward)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # first, since Dynamo cannot trace a ContextVar
            return attention_forward(self, *args, **kwargs)
        deferral = _deferral(self)
        # Also where it is None: an attention inside another one must not settle for it.
        token = _current.set(deferral)
        try:
            result = attention_forward(self, *args, **kwargs)
        finally:
            _current.reset(token)
        if deferral is not None and deferral.is_owed:
            raise RuntimeError(deferral.complaint("called a norm of q or k and no rotary embedding after it"))
        return result

    return forward

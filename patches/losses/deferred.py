"""Logits that are computed when somebody reads them.

A `DeferredLogits` is a `torch.Tensor` of the right shape, dtype and device without memory of its own. Operations that
leave the vocabulary as it is (shifting, slicing, flattening, casts, scales, softcaps, detach) give another one. Losses
and reductions over the vocabulary run on chunks of rows (`handlers`). Anything else computes the logits once, exactly
as upstream does, and goes on with them; from then on the tensor is that value.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..kernels.notices import say_once
from .recipe import Recipe

View = Callable[[torch.Tensor], torch.Tensor]
_T = torch.Tensor
_ATTRIBUTES = """
    shape dtype device layout ndim itemsize nbytes requires_grad grad_fn is_leaf
    is_cuda is_sparse is_quantized is_meta is_nested is_mkldnn is_xpu is_mps
"""
_METHODS = """
    size dim ndimension numel nelement __len__ __hash__ get_device element_size stride is_contiguous
    is_floating_point is_complex is_inference is_signed
"""
_FUNCTIONS = "numel is_floating_point is_complex is_inference is_signed"
# What is answered without logits: everything that asks for the form of a tensor only.
METADATA = frozenset(
    [
        *(getattr(_T, name).__get__ for name in _ATTRIBUTES.split()),
        *(getattr(_T, name) for name in _METHODS.split()),
        *(getattr(torch, name) for name in _FUNCTIONS.split()),
    ]
)
_ASSIGNMENTS = "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__"
_IN_PLACE = frozenset(getattr(_T, name) for name in f"{_ASSIGNMENTS} __ixor__".split() if hasattr(_T, name))
Handler = Callable[..., Any]
handlers: dict[Any, Handler] = {}
"""What runs in place of a torch function whose first argument is deferred; `NotImplemented` asks for the logits."""


class DeferredLogits(torch.Tensor):
    """Logits [..., V] that are owed. `recipe` says how they come about; see the module."""

    recipe: Recipe
    _value: torch.Tensor | None
    _origin: "DeferredLogits | None"
    _seen_as: View | None
    _written: bool

    @staticmethod
    def __new__(cls, recipe: Recipe) -> "DeferredLogits":
        """An instance without a graph; `defer` gives one with it."""
        made: DeferredLogits = torch.Tensor._make_wrapper_subclass(
            cls, recipe.shape, dtype=recipe.dtype, device=recipe.rows.device
        )
        made.recipe = recipe
        made._value = made._origin = made._seen_as = None
        made._written = False
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        owner = args[0] if args and isinstance(args[0], DeferredLogits) else None
        if owner is not None and owner.pending:
            if func in METADATA:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            handler = handlers.get(func)
            result = NotImplemented if handler is None else handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _on_values(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub takes it for a static method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Reached from code that takes tensors below autograd, such as collectives.
        return func(*_replaced(args, _below), **_replaced(kwargs or {}, _below))

    @property
    def pending(self) -> bool:
        """Whether nobody has computed these logits, or those that they are a view of and that were written to."""
        with torch._C.DisableTorchFunctionSubclass():
            if self._value is None and self._origin is not None and self._origin._is_written():
                self._value = self._seen_as(self._origin.read("a view"))  # type: ignore[misc]  # a base comes with a view
            return self._value is None

    def _is_written(self) -> bool:
        return self._written or (self._origin is not None and self._origin._is_written())

    def read(self, reader: str) -> torch.Tensor:
        """The logits, computed now if they have not been. `reader` is named to the user, once."""
        if self.pending:
            say_once(f"cross_entropy: logits were read (by {reader}) and therefore computed", "logits read")
            base = self._origin
            # A view of most of the logits is a view of them all, so that writing to the one changes the other.
            if (
                base is not None
                and self._seen_as is not None
                and 2 * self.recipe.rows.numel() > base.recipe.rows.numel()
            ):
                self._value = self._seen_as(base.read(reader))
            else:
                with torch.enable_grad():
                    self._value = self.recipe.compute()
        value: torch.Tensor = self._value  # type: ignore[assignment]  # computed above
        return value

    def writable(self) -> torch.Tensor:
        """The logits, in the memory that all that are views of the same ones share."""
        self._written = True
        if self._origin is not None and self._seen_as is not None:
            shared = self._seen_as(self._origin.writable())
            self._value = shared
            return shared
        return self.read("a change in place")

    def derive(self, recipe: Recipe, view: View | None = None) -> "DeferredLogits":
        """Others made from these: with `view`, a function of the real logits, they share memory as its result would."""
        made = defer(recipe)
        if view is not None:
            made._origin, made._seen_as = self, view
        return made


def defer(recipe: Recipe) -> DeferredLogits:
    """Logits that are owed, as part of the graph of their rows and head."""
    made: DeferredLogits = _Owed.apply(recipe, *recipe.tensors())  # type: ignore[no-untyped-call]  # torch's
    return made


class _Owed(torch.autograd.Function):
    """Ties deferred logits to what they come from, for whatever walks the graph or differentiates them below Python."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *tensors: torch.Tensor | None) -> DeferredLogits:
        ctx.recipe = recipe
        return DeferredLogits(recipe)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[1:]
        recipe: Recipe = ctx.recipe
        recipe.check()
        local = [
            tensor if tensor is None else tensor.detach().requires_grad_(flag)
            for tensor, flag in zip(recipe.tensors(), needed, strict=True)
        ]
        with torch.enable_grad():
            logits = recipe.logits_of(*local)
        wanted: list[Any] = [tensor for tensor, flag in zip(local, needed, strict=True) if flag]
        found = iter(torch.autograd.grad(logits, wanted, grad))
        return None, *(next(found) if flag else None for flag in needed)


def _below(logits: DeferredLogits) -> torch.Tensor:
    return logits.read("by code below autograd").detach()


def _replaced(value: Any, by: Callable[[DeferredLogits], torch.Tensor]) -> Any:
    """Arguments with every deferred tensor in them replaced."""
    if isinstance(value, DeferredLogits):
        return by(value)
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, by) for item in value)
    if type(value) is dict:
        return {key: _replaced(item, by) for key, item in value.items()}
    return value


def _name(func: Any) -> str:
    owner = getattr(func, "__self__", None)
    return str(getattr(owner, "__name__", None) or getattr(func, "__name__", func))


def _on_values(func: Any, args: Any, kwargs: Any) -> Any:
    """The function on real logits; what it changes in place is seen by everybody who holds them."""
    name = _name(func)
    in_place = func in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    target = args[0] if in_place and args and isinstance(args[0], DeferredLogits) else kwargs.get("out")
    if not isinstance(target, DeferredLogits):
        return func(*_replaced(args, lambda item: item.read(name)), **_replaced(kwargs, lambda item: item.read(name)))
    value = target.writable()
    result = func(*_replaced(args, lambda item: item.read(name)), **_replaced(kwargs, lambda item: item.read(name)))
    return target if result is value else result

"""What holds while a trainer computes its loss: deferred logits, and functions of TRL's that understand them."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch

from ..kernels.notices import say_once
from ..losses.deferral import deferring, obstacle

Method = Callable[..., Any]
Scope = Callable[..., AbstractContextManager[None]]
"""Called with the trainer and the method's arguments; open while the method runs."""


def causal_lm(model: Any) -> Any:
    """The causal language model inside wrappers of DDP, accelerate and PEFT, or None."""
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    if callable(getattr(model, "get_base_model", None)):
        model = model.get_base_model()
    has_head = isinstance(model, torch.nn.Module) and callable(getattr(model, "get_output_embeddings", None))
    return model if has_head else None


@contextmanager
def deferred_logits(*models: Any) -> Iterator[None]:
    """Within it, these models (None is skipped) return deferred logits, unless their head forbids it; it says why."""
    with ExitStack() as stack:
        for model in models:
            language_model = causal_lm(model)
            if language_model is None:
                continue
            head = language_model.get_output_embeddings()
            reason = obstacle(language_model, head)
            if reason is None:
                stack.enter_context(deferring(head))
            else:
                say_once(f"{type(language_model).__name__} computes its logits, because {reason}")
        yield


@contextmanager
def replaced(module: ModuleType, functions: Mapping[str, Any]) -> Iterator[None]:
    """Within it, globals of a module are others; those that it does not have are not added."""
    before = {name: vars(module)[name] for name in functions if name in vars(module)}
    try:
        for name in before:
            setattr(module, name, functions[name])
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def within(trainer: type, scope: Scope, *names: str) -> dict[str, Method]:
    """Those of the named methods that a trainer class has, each running inside `scope(self, ...)`."""
    return {name: _inside(getattr(trainer, name), scope) for name in names if hasattr(trainer, name)}


def _inside(original: Method, scope: Scope) -> Method:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with scope(self, *args, **kwargs):
            return original(self, *args, **kwargs)

    return method

"""Dynamic 4-bit: which linear layers stay in 16 bits, measured on the user's own model and text."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import quantize
    from .decision import decide, dynamic_config
    from .lora import load_with_adapter
    from .measuring import measure

__all__ = ["decide", "dynamic_config", "load_with_adapter", "measure", "quantize"]

_HOME = {
    "decide": "decision",
    "dynamic_config": "decision",
    "load_with_adapter": "lora",
    "measure": "measuring",
    "quantize": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)

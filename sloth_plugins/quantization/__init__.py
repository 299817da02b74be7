"""Dynamic 4-bit: which linear layers stay in 16 bits, measured on the user's own model and text."""

from typing import TYPE_CHECKING

from ..lazy import loader

if TYPE_CHECKING:
    from .checkpoint import quantize
    from .decision import decide, dynamic_config
    from .lora import load_with_adapter
    from .measuring import measure

__all__ = ["decide", "dynamic_config", "load_with_adapter", "measure", "quantize"]

__getattr__ = loader(
    __name__,
    {
        "decide": "decision",
        "dynamic_config": "decision",
        "load_with_adapter": "lora",
        "measure": "measuring",
        "quantize": "checkpoint",
    },
)

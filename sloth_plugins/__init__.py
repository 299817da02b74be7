"""Faster fine-tuning of open language models by one environment flag.

`SLOTH_PLUGINS=1 accelerate launch train.py` needs no import of this package. By hand: `patch(model)`,
`revert(model)`, and `activate()` where the flag is not an option. Everything is loaded on first use, since torch
imports this package in every process.
"""

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .activation import activate, deactivate
    from .errors import SlothError
    from .loading import FastLanguageModel, is_bfloat16_supported
    from .patching import patch, revert

__all__ = [
    "FastLanguageModel",
    "SlothError",
    "__version__",
    "activate",
    "deactivate",
    "is_bfloat16_supported",
    "patch",
    "revert",
]

_HOME = {
    "activate": "activation",
    "deactivate": "activation",
    "patch": "patching",
    "revert": "patching",
    "SlothError": "errors",
    "FastLanguageModel": "loading",
    "is_bfloat16_supported": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)

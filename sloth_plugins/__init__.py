"""Faster fine-tuning of open language models by one environment flag.

`SLOTH_PLUGINS=1 accelerate launch train.py` needs no import of this package. By hand: `patch(model)`,
`revert(model)`, and `activate()` where the flag is not an option. Everything is loaded on first use, since torch
imports this package in every process.
"""

from typing import TYPE_CHECKING

from ._version import __version__
from .lazy import loader

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

__getattr__ = loader(
    __name__,
    {
        "activate": "activation",
        "deactivate": "activation",
        "patch": "patching",
        "revert": "patching",
        "SlothError": "errors",
        "FastLanguageModel": "loading",
        "is_bfloat16_supported": "loading",
    },
)

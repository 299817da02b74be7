"""What the user allows in memory: checked before anything is loaded, handed to the plans of a model."""

import os
from importlib import import_module
from typing import Any

from .errors import SlothError

# Plans are no business of a process that only reads the flag, so they are imported by name where they are needed.
_BUDGET = "sloth_plugins.patches.checkpointing.budget"
_BACKBONE = "sloth_plugins.patches.checkpointing.backbone"
VARIABLES = ("SLOTH_MEMORY", "SLOTH_HOST_MEMORY")


def check_environment() -> None:
    """Raise `SlothError` for a SLOTH_MEMORY or SLOTH_HOST_MEMORY that cannot be read."""
    if not any(name in os.environ for name in VARIABLES):
        return
    try:
        import_module(_BUDGET).from_environment()
        import_module(_BUDGET).host_bytes(0)
    except ValueError as error:
        raise SlothError(str(error)) from None


def allow(model: Any, memory: str) -> None:
    """Let the plans of a model take so much memory, whatever SLOTH_MEMORY says.

    Raises `SlothError` for a text that cannot be read.
    """
    try:
        budget = import_module(_BUDGET).parse(memory, "memory")
    except (ValueError, AttributeError):
        raise SlothError(f"memory={memory!r} is not one of: {import_module(_BUDGET).FORMS}") from None
    import_module(_BACKBONE).allow(model, budget)

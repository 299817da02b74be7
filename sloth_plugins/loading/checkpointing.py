"""What `use_gradient_checkpointing` means: transformers' own, and with "smart" plans of what is computed again."""

from __future__ import annotations

from typing import Any

from ..errors import SlothError, nearest

SMART = ("smart", "unsloth")
# By a pattern rather than by name: where one of them cannot run, checkpointing as such still does.
PLANS = "*:checkpointing*,trainer:memory_plans*"


def terms(how: Any) -> str:
    """The terms of a selection that a value of `use_gradient_checkpointing` asks for; raises SlothError for others."""
    if isinstance(how, bool) or how is None:
        return ""
    if how not in SMART:
        known = ("True", "False", *SMART)
        raise SlothError(f"use_gradient_checkpointing={how!r} is none of {', '.join(known)}{nearest(str(how), known)}")
    return PLANS


def set_checkpointing(model: Any, how: bool | str) -> None:
    """Turn a model's gradient checkpointing on or off.

    It is not reentrant, so that adapters get gradients although the inputs of the first layer have none.
    """
    terms(how)
    # transformers renamed both.
    name = next(name for name in ("activation", "gradient") if hasattr(model, f"{name}_checkpointing_enable"))
    if how:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
        model.config.use_cache = False
    else:
        getattr(model, f"{name}_checkpointing_disable")()

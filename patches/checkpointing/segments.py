"""Memory in segments that grow, so that what lies between blocks of other sizes can be used."""

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_NAME = "expandable_segments"


@contextmanager
def growing_segments() -> Iterator[None]:
    """Within it, torch's allocator takes new memory in segments that grow. What it has already stays as it is.

    Nothing changes where the user has said whether it shall, where the allocator is another one, and beside vLLM, whose
    own pools cannot be in such segments.
    """
    settings = _settings()
    if settings is None or _NAME in settings:
        yield
        return
    before = f"{settings}," if settings else ""
    _set(f"{before}{_NAME}:True")
    try:
        yield
    finally:
        _set(f"{before}{_NAME}:False")


def _settings() -> str | None:
    """What the allocator was told; None where it cannot be told anything."""
    # Linux under Windows has no such segments.
    if "vllm" in sys.modules or "microsoft" in platform.release().lower() or not torch.cuda.is_initialized():
        return None
    if torch.cuda.get_allocator_backend() != "native" or not hasattr(torch._C, "_accelerator_getAllocatorSettings"):
        return None
    return torch._C._accelerator_getAllocatorSettings()


def _set(settings: str) -> None:
    change: Any = torch._C._accelerator_setAllocatorSettings
    change(settings)

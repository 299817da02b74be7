"""Memory of a GPU in segments that grow, so that what lies between blocks of other sizes can be used.

Plans count the bytes that are allocated; in segments of fixed sizes several hundred MiB more are taken and of no use.
"""

import os
import platform
import sys
from typing import Any

NAME = "expandable_segments"
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

# What the allocator was told before; None while it is as the user has it.
_before: str | None = None


def grow() -> None:
    """Let torch's allocator take new memory in segments that grow; what it has already stays as it is.

    Nothing changes where the user has said whether it shall, where the allocator is another one, and beside vLLM, whose
    own pools cannot be in such segments.
    """
    global _before
    torch: Any = sys.modules.get("torch")
    if _before is not None or torch is None or torch.version.cuda is None or "vllm" in sys.modules:
        return
    # Linux under Windows has no such segments.
    if "microsoft" in platform.release().lower():
        return
    settings = _settings(torch)
    if NAME in settings or "backend" in settings:
        return
    _before = f"{settings}," if settings else ""
    _tell(torch, f"{_before}{NAME}:True")


def stay() -> None:
    """Undo `grow` for memory that is taken from now on."""
    global _before
    if _before is not None:
        _tell(sys.modules["torch"], f"{_before}{NAME}:False")
    _before = None


def _settings(torch: Any) -> str:
    ask = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    given = next((os.environ[name] for name in VARIABLES if os.environ.get(name)), "")
    # Older versions cannot be asked, newer ones read the environment later.
    return given or ("" if ask is None else str(ask()))


def _tell(torch: Any, settings: str) -> None:
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (torch.cuda.memory._set_allocator_settings if change is None else change)(settings)

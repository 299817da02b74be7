"""Memory of a GPU in segments that grow, so that what lies between blocks of other sizes can be used.

Plans count the bytes that are allocated; in segments of fixed sizes several hundred MiB more are taken and of no use.
"""

import os
import platform
import sys
from typing import Any

NAME = "expandable_segments"
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

# What the allocator was told before; None while segments do not grow because of us.
_before: str | None = None
# What it was told by us at last, and what it had been told until then.
_told: tuple[str, str] | None = None


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
    if _told is not None and settings == _told[0]:
        settings = _told[1]
    if NAME in settings or "backend" in settings:
        return
    _before = settings
    _tell(torch, settings, grows=True)


def stay() -> None:
    """Undo `grow` for memory that is taken from now on."""
    global _before
    if _before is not None:
        _tell(sys.modules["torch"], _before, grows=False)
    _before = None


def _settings(torch: Any) -> str:
    ask = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    given = next((os.environ[name] for name in VARIABLES if os.environ.get(name)), "")
    # Older versions cannot be asked, newer ones read the environment later.
    return given or ("" if ask is None else str(ask()))


def _tell(torch: Any, before: str, *, grows: bool) -> None:
    global _told
    settings = ",".join(filter(None, (before, f"{NAME}:{grows}")))
    _told = settings, before
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (torch.cuda.memory._set_allocator_settings if change is None else change)(settings)

"""Whether anybody watches the calls of a module, so that a forward must make them."""

from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook


def is_watched(module: torch.nn.Module) -> bool:
    """Whether a hook of any kind expects the module to be called."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or bool(_has_any_global_hook())  # type: ignore[no-untyped-call]  # torch's


def only_moves_inputs(hook: Any) -> bool:
    """Whether an accelerate hook is that of a model with a device_map which keeps all weights where they are used."""
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload

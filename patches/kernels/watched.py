"""Whether anybody watches the calls of a module, so that a forward must make them."""

import torch
from torch.nn.modules.module import _has_any_global_hook


def is_watched(module: torch.nn.Module) -> bool:
    """Whether a hook of any kind expects the module to be called."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or bool(_has_any_global_hook())  # type: ignore[no-untyped-call]  # torch's

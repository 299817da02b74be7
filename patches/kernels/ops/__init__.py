"""The fused ops that patched models call, each with a hand-written backward.

An op runs the Triton kernels or the torch reference, as `dispatch.backend_for` decides. Callers ask the matching
`supports_*` first and run upstream's own code where it says no. A double backward raises.
"""

from .activation import activate, supports_activate
from .glu import glu, glu_fused, supports_glu, supports_glu_fused
from .layer_norm import layer_norm, supports_layer_norm
from .qk_norm_rope import qk_norm_rope, supports_qk_norm_rope
from .rms_norm import rms_norm, supports_rms_norm
from .rope import apply_rotary, supports_rotary

__all__ = [
    "activate",
    "apply_rotary",
    "glu",
    "glu_fused",
    "layer_norm",
    "qk_norm_rope",
    "rms_norm",
    "supports_activate",
    "supports_glu",
    "supports_glu_fused",
    "supports_layer_norm",
    "supports_qk_norm_rope",
    "supports_rms_norm",
    "supports_rotary",
]

"""The fused ops that patched models call, each with a hand-written backward.

An op runs the Triton kernels or the torch reference, as `dispatch.backend_for` decides. Callers ask the matching
`supports_*` first and run upstream's own code where it says no. A double backward raises.
"""

from .rms_norm import rms_norm, supports_rms_norm
from .rope import apply_rotary, supports_rotary
from .swiglu import supports_swiglu, swiglu

__all__ = ["apply_rotary", "rms_norm", "supports_rms_norm", "supports_rotary", "supports_swiglu", "swiglu"]

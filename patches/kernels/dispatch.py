"""Which implementation runs for these tensors: the Triton kernels, the torch reference, or neither."""

import contextlib
import functools
import os
from typing import Literal

import torch
from torch.autograd import forward_ad

Backend = Literal["triton", "reference"]

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
# triton.jit reads the variable when it decorates a kernel, so a later change would have no effect.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing
_transforms_active = torch._C._are_functorch_transforms_active
_SAME_DEVICE = contextlib.nullcontext()


@functools.cache
def triton_importable() -> bool:
    """Whether `import triton` works here; asked once."""
    try:
        import triton  # noqa: F401 - the import itself is the question
    except ImportError:
        return False
    return True


def backend_for(*tensors: torch.Tensor) -> Backend | None:
    """Choose the implementation for an op over `tensors`.

    "triton": all on one CUDA device, or on the CPU in a process started with TRITON_INTERPRET=1.
    "reference": all plain CPU tensors.
    None, the caller runs upstream's own code: a tensor subclass (DTensor, FakeTensor, quantised weights), another or
    a mixed device, a dtype other than fp32, fp16 and bf16, an empty tensor, or a program that must see every op
    (torch.compile, torch.jit.trace, functorch transforms, forward-mode differentiation).
    """
    # First, because Dynamo folds it to True and then never traces the rest.
    if _is_compiling():
        return None
    if _is_tracing() or _transforms_active() or forward_ad._current_level >= 0:
        return None
    device = tensors[0].device
    for tensor in tensors:
        if (
            type(tensor) not in _PLAIN
            or tensor.dtype not in _DTYPES
            or tensor.device != device
            or not tensor.numel()
            or tensor.layout is not torch.strided
        ):
            return None
    kind = device.type
    if kind == "cuda":
        return "triton" if triton_importable() else None
    if kind == "cpu":
        return "triton" if _INTERPRETED and triton_importable() else "reference"
    return None


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Context in which a Triton launch goes to `tensor`'s device; Triton itself uses the current one."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _SAME_DEVICE
    return torch.cuda.device(tensor.device)


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def multiprocessors(tensor: torch.Tensor) -> int:
    """Streaming multiprocessors of the tensor's device; 2 in the interpreter, so that partial sums are exercised."""
    return _multiprocessors(tensor.get_device()) if tensor.is_cuda else 2

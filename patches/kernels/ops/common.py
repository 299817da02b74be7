"""What all ops share: finding the implementation, and whether a graph is needed."""

import functools
import importlib
from typing import Any

import torch

from ..dispatch import backend_for

MAX_ROW = 65536
# Row and program numbers are 32-bit in the kernels; offsets are 64-bit.
MAX_ROWS = 2**31 - 2**16


@functools.cache
def implementation(module: str) -> Any:
    """A module of kernels by its name; late, because those in Triton exist only where it does."""
    return importlib.import_module(f"{__package__.rpartition('.')[0]}.{module}")


def implementation_beside(reference: str, op: str, x: torch.Tensor) -> Any:
    """The Triton module of an op where it runs on x, else the module `reference` of the same functions."""
    return implementation(op if backend_for(x) == "triton" else reference)


def kernels_for(op: str, *tensors: torch.Tensor) -> Any:
    """The module that runs an op on these tensors. Raises TypeError where none does."""
    backend = backend_for(*tensors)
    if backend is None:
        given = ", ".join(f"{type(t).__name__}({t.dtype}, {t.device}, {tuple(t.shape)})" for t in tensors)
        raise TypeError(f"{op} cannot run on {given} here; ask its supports_ function first")
    return implementation(op if backend == "triton" else "reference")


def needs_graph(*tensors: torch.Tensor) -> bool:
    """Whether a result of these tensors will be differentiated."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def fits_in_place(grad: torch.Tensor, strides: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a gradient's buffer has the layout and dtype that are wanted of the result."""
    return grad.dtype is dtype and grad.stride() == strides

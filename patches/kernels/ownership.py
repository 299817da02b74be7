"""Whether a backward may overwrite a tensor it was given: only if provably nobody else can ever see that memory.

A tensor reaches a backward either as a saved tensor or as the incoming gradient. In both cases the engine and the
backward's own frames hold a fixed number of references to it, to its Python object and to its storage. Anybody else
(a variable, a hook, an alias, another node that saved it, a gradient that a second branch shares, a view's base) adds
to one of these counts. The fixed numbers differ between versions of torch and Python, so they are measured once on a
tiny graph; any other number means that the tensor is not ours.
"""

import functools
import sys
import threading
import weakref
from typing import Any, Literal

import torch

from .once import differentiable_once

Origin = Literal["saved", "incoming"]
Counts = tuple[int, int, int, int]

_keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
_storage_use_count = getattr(torch._C, "_storage_Use_Count", None)
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _counts(tensor: torch.Tensor) -> Counts:
    storage = tensor.untyped_storage()
    assert _storage_use_count is not None
    # A Python storage object is shared by all who ask for it, so its references count as well.
    held = (tensor._use_count(), sys.getrefcount(tensor))  # type: ignore[attr-defined]  # missing in torch's stubs
    return *held, _storage_use_count(storage._cdata), sys.getrefcount(storage)


def exclusively_owned(tensor: torch.Tensor, origin: Origin) -> bool:
    """Whether the backward that calls this may overwrite `tensor`, a local variable of its own.

    `origin` says how the backward got it: "saved" (unpacked from ctx.saved_tensors, and the forward ran while
    `saving_is_plain()`) or "incoming" (an argument). Call it from the decorated backward itself, once the saved
    tensors are unpacked: the measured counts belong to that frame. False whenever in doubt. Kernels still queued on
    another CUDA stream hold no reference: as with freed memory, that stream must have been joined.
    """
    if _keep_graph is None or _storage_use_count is None or type(tensor) is not torch.Tensor:
        return False
    if _keep_graph() or not _dense(tensor) or tensor._is_view() or weakref.getweakrefcount(tensor):
        return False
    # A leaf's memory may come from outside torch (numpy, dlpack), where nobody's references are counted.
    if origin == "saved" and tensor.grad_fn is None:
        return False
    expected = _plain_counts()
    return expected is not None and _counts(tensor) == expected[origin]


def _dense(tensor: torch.Tensor) -> bool:
    """Whether no two elements share memory and none is left out between them, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def saving_is_plain() -> bool:
    """Whether tensors saved now come back as they are: no saved_tensors_hooks (offloading, torch.utils.checkpoint)."""
    return _top_hooks is not None and _top_hooks(False) is None


def graph_is_kept() -> bool:
    """Whether the backward that runs now may run again (retain_graph), so that what it saved must stay as it is."""
    return _keep_graph is None or bool(_keep_graph())


class _Probe(torch.autograd.Function):
    """Shaped as our own functions: inputs saved, counts taken one call below the decorated backward."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, seen: dict[str, Counts]) -> Any:
        ctx.save_for_backward(a, b)
        ctx.seen = seen
        return a * b, a + b

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, first: torch.Tensor, second: torch.Tensor) -> Any:
        a, _b = ctx.saved_tensors
        _record(first, "incoming", ctx.seen)
        _record(a, "saved", ctx.seen)
        return first, second, None


def _record(tensor: torch.Tensor, origin: str, seen: dict[str, Counts]) -> None:
    seen[origin] = _counts(tensor)


def _probe(share: str = "") -> dict[str, Counts]:
    """Counts in the plain case, or with the saved tensor and the gradient both shared in one way."""
    seen: dict[str, Counts] = {}
    others: list[Any] = []
    apply: Any = _Probe.apply
    leaf = torch.ones(4, requires_grad=True)
    a = leaf * 2
    # Before the probe's own node, so that its half of the gradient still waits when the probe runs.
    branch = leaf * 5
    y, _z = apply(a, leaf * 3, seen)
    if share == "python":
        others.append(a)
        y.register_hook(others.append)
    elif share == "alias":
        others.append(a.detach())
        y.register_hook(lambda grad: others.append(grad.detach()))
    elif share == "engine":
        others.append(a * a)
        y = branch + y
    loss = (y * 2).sum()
    del a, y, branch
    loss.backward()
    return seen


@functools.cache
def _plain_counts() -> dict[str, Counts] | None:
    """The counts of unshared tensors, or None if on this torch some way of sharing does not change them."""
    found: list[dict[str, Counts]] = []
    # A thread of its own has no hooks, modes or disabled gradients that would colour the measurement.
    thread = threading.Thread(target=lambda: found.extend(_probe(share) for share in ("", "python", "alias", "engine")))
    thread.start()
    thread.join()
    if len(found) != 4 or any(shared[origin] == found[0][origin] for shared in found[1:] for origin in found[0]):
        return None
    return found[0]

"""Decoder layers as CUDA graphs, where the host could not launch their kernels as fast as the GPU runs them.

A layer that is called with the same shapes again and again is captured once, forward and backward, and then costs one
launch each way. What its backward needs stays in the graph's memory, as it would stay in the allocator's until the
backward; only it is not free in between. Hence the two limits: `MAX_WORK`, beyond which launches hide behind the GPU's
own time, and `MAX_SHARE` of the device's memory for all layers together.
"""

import dataclasses
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..kernels.four_bit_weight import FourBit
from ..kernels.notices import say_once
from ..kernels.once import differentiable_once
from ..kernels.ownership import graph_is_kept, saving_is_plain
from . import attention_block, mlp_block
from .policy import Policy
from .resident import ignored
from .run import Run, rows

Tensor = torch.Tensor

# Tokens times base weights of a layer: half a millisecond of products on an H200.
MAX_WORK = 2.6e11
MAX_SHARE = 0.05
# Calls in a row with the same shapes before a layer is captured.
SEEN = 3
VARIABLE = "SLOTH_GRAPHS"


class _Token:
    """Alive while the activations of a replayed forward wait for their backward."""

    __slots__ = ("__weakref__",)


class _Device:
    """What the graphs of one device share: memory, and the order in which they were captured.

    Temporary memory of one graph may be what a later captured one keeps. So a forward is replayed only while nothing
    that was captured with it or after it still waits for its backward.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
        self.count = 0
        self.bytes = 0
        self.is_broken = False
        self.waiting: dict[int, weakref.ref[_Token]] = {}
        # The pool is gone with its last graph, and layers come and go.
        with self.capturing() as self.anchor:
            self.kept = torch.zeros(1, device=device)

    def may_replay(self, index: int) -> bool:
        for other, token in list(self.waiting.items()):
            if token() is None:
                del self.waiting[other]
            elif other >= index:
                return False
        return True

    def give_up(self, error: RuntimeError) -> None:
        """Capture nothing more on this device, and say so."""
        self.is_broken = True
        say_once(f"blocks: no CUDA graphs from here on, because capturing one failed ({' '.join(str(error).split())})")

    @contextmanager
    def capturing(self) -> Iterator[torch.cuda.CUDAGraph]:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                yield graph
            finally:
                graph.capture_end()
        current.wait_stream(self.stream)


_devices: dict[torch.device, _Device] = {}


class LayerGraph:
    """Forward and backward of one layer for one kind of call."""

    def __init__(self, key: tuple[Any, ...], device: _Device, run: Run, x: Tensor, needs: Sequence[bool]) -> None:
        self.key, self.device, self.needs = key, device, needs
        self.index, device.count = device.count, device.count + 1
        self.inputs = [x.clone(), run.cos.clone(), run.sin.clone()]
        self.run = dataclasses.replace(run, cos=self.inputs[1], sin=self.inputs[2])
        self.backward_graph: torch.cuda.CUDAGraph | None = None
        self.pointers = self._pointers()
        with ignored(), device.capturing() as self.forward_graph:
            self.run.parts.copies.refresh()
            self.attention, mid = attention_block.forward(self.run, self.inputs[0], differentiable=True)
            self.source = rows(self.inputs[0]) if run.parts.is_parallel else mid
            self.mlp, self.out = mlp_block.forward(self.run, self.source, mid)

    def _pointers(self) -> list[int]:
        """Where the base weights lie: sharding may free them between forward and backward, and put them elsewhere."""
        weights = (p.weight for group in self.run.parts.groups for p in group.projections)
        return [(w.packed if isinstance(w, FourBit) else w).data_ptr() for w in weights]

    def forward(self, run: Run, x: Tensor) -> Tensor:
        """The layer's output [B, S, h]."""
        torch._foreach_copy_(self.inputs, [x, run.cos, run.sin])
        self.forward_graph.replay()
        return self.out.clone().view(x.shape)

    def _differentiate(self, grad: Tensor, need_dx: bool, overwrite: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        run, x = self.run, self.inputs[0]
        n = len(run.parts.qkv.parameters()) + len(run.parts.o.parameters())
        parallel = run.parts.is_parallel
        dmid, of_mlp = mlp_block.backward(
            run, self.source, self.mlp, grad, list(self.needs[n:]), need_dx=need_dx or not parallel,
            overwrite=overwrite, in_place=False,
        )  # fmt: skip
        through = grad if parallel or dmid is None else dmid
        dx, of_attention = attention_block.backward(
            run, x, self.attention, through, list(self.needs[:n]), need_dx=need_dx, in_place=False
        )
        if parallel and dx is not None and dmid is not None:
            dx = rows(dx) + dmid
        return dx, of_attention + of_mlp

    def backward(self, grad: Tensor, need_dx: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        """(gradient of x [B, S, h], gradients of the adapters), in memory of their own."""
        shape = self.inputs[0].shape
        if graph_is_kept() or self._pointers() != self.pointers:
            dx, grads = self._differentiate(rows(grad), need_dx, False)
            return None if dx is None else dx.view(shape), grads
        if self.backward_graph is None:
            self.grad = rows(grad).clone()
            try:
                with ignored(), self.device.capturing() as graph:
                    self.dx, self.grads = self._differentiate(self.grad, need_dx, True)
            except RuntimeError as error:
                self.device.give_up(error)
                dx, grads = self._differentiate(rows(grad), need_dx, False)
                return None if dx is None else dx.view(shape), grads
            self.backward_graph = graph
        else:
            self.grad.copy_(rows(grad))
        self.backward_graph.replay()
        made = [g for g in self.grads if g is not None]
        fresh = [torch.empty_like(g) for g in made]
        torch._foreach_copy_(fresh, made)
        given = iter(fresh)
        return (
            None if self.dx is None else self.dx.clone().view(shape),
            [None if g is None else next(given) for g in self.grads],
        )


class GraphedLayer(torch.autograd.Function):
    """A whole layer by its graph: x [B, S, h] and the adapters of all groups, in order."""

    @staticmethod
    def forward(ctx: Any, graph: LayerGraph, run: Run, x: Tensor, *params: Tensor) -> Tensor:
        """The layer's output [B, S, h]."""
        ctx.graph, ctx.token = graph, _Token()
        graph.device.waiting[graph.index] = weakref.ref(ctx.token)
        ctx.save_for_backward(*params)
        return graph.forward(run, x)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of x and of the adapters."""
        ctx.saved_tensors  # noqa: B018 - it raises if an adapter was changed since, or if the graph was freed
        dx, grads = ctx.graph.backward(grad, ctx.needs_input_grad[2])
        if not graph_is_kept():
            ctx.token = None
        return None, None, dx, *grads


@dataclasses.dataclass(slots=True)
class _Seen:
    key: tuple[Any, ...] | None = None
    times: int = 0
    graph: LayerGraph | None = None


_seen: WeakKeyDictionary[torch.nn.Module, _Seen] = WeakKeyDictionary()


def _is_suitable(run: Run, x: Tensor) -> bool:
    """Whether a call of this kind is worth a graph, and has nothing in it that differs from one replay to the next."""
    parts = run.parts
    if (
        not x.is_cuda
        or run.cache is not None
        or run.policy is not Policy.KEEP
        or not run.may_hold
        or not torch.is_grad_enabled()
        or not saving_is_plain()
    ):
        return False
    weights = sum(p.shape[0] * p.shape[1] for group in parts.groups for p in group.projections)
    if x.shape[0] * x.shape[1] * weights > MAX_WORK or any(group.has_dropout for group in parts.groups):
        return False
    plain = run.attention.is_plain and not torch.cuda.is_current_stream_capturing()
    return plain and os.environ.get(VARIABLE, "1") != "0"


def graph_for(layer: torch.nn.Module, run: Run, x: Tensor, params: Sequence[torch.nn.Parameter]) -> LayerGraph | None:
    """The graph to run this call of a layer with, captured now if its time has come; None for the ordinary way."""
    if not _is_suitable(run, x):
        return None
    needs = tuple(p.requires_grad for p in params)
    key = (
        x.shape, x.dtype, x.device, x.requires_grad, run.dtype, run.cos.shape, run.cos.dtype, id(run.parts), needs,
        run.attention.scaling,
    )  # fmt: skip
    seen = _seen.setdefault(layer, _Seen())
    if seen.key != key:
        seen.key, seen.times = key, 0
    seen.times += 1
    if seen.graph is not None and seen.graph.key == key and not seen.graph.device.is_broken:
        return seen.graph if seen.graph.device.may_replay(seen.graph.index) else None
    if x.device not in _devices:
        _devices[x.device] = _Device(x.device)
    device = _devices[x.device]
    if device.is_broken or seen.times <= SEEN or not device.may_replay(device.count) or not any(needs):
        return None
    size = _bytes(run, x)
    if device.bytes + size > MAX_SHARE * torch.cuda.get_device_properties(x.device).total_memory:
        return None
    try:
        with torch.cuda.device(x.device):
            seen.graph = LayerGraph(key, device, run, x.detach(), needs)
    except RuntimeError as error:
        device.give_up(error)
        return None
    device.bytes += size
    weakref.finalize(seen.graph, _forget, device, size)
    return seen.graph


def tokens_held(layer: torch.nn.Module) -> int:
    """The tokens of the micro-batch for which a layer's graph has memory of its own; 0 without one."""
    seen = _seen.get(layer)
    if seen is None or seen.graph is None or seen.graph.backward_graph is None:
        return 0
    return seen.graph.inputs[0].shape[:2].numel()


def drop() -> None:
    """Let go of all graphs, whose memory is free once none waits for its backward."""
    _seen.clear()
    _devices.clear()


def _forget(device: _Device, size: int) -> None:
    device.bytes -= size


def _bytes(run: Run, x: Tensor) -> int:
    """What a layer keeps for its backward, by the shapes of its products and of the residual stream."""
    groups = (run.parts.qkv, run.parts.up)
    features = 3 * x.shape[-1] + run.parts.o.k + sum(p.shape[0] for group in groups for p in group.projections)
    return x.shape[0] * x.shape[1] * features * x.element_size()

"""What cannot be known from shapes: how long a layer takes, and what the graphs of other code keep."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Span:
    """The time between two moments of the device's work."""

    __slots__ = ("_begin", "_cuda", "_end")

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._begin: Any = None
        self._end: Any = None

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Around the work."""
        self._end, self._begin = None, self._now()
        yield
        self._end = self._now()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
        event.record()
        return event

    def seconds(self) -> float | None:
        """How long it was, waiting for the device to get there; None if it never was."""
        if self._end is None:
            return None
        if not self._cuda:
            return float(self._end - self._begin)
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3


class _Saved:
    """Bytes of the storages that a graph saves, each counted once."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def hooks(self) -> Any:
        """A context in which they are counted."""
        self._sizes = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            self._sizes[storage._cdata] = storage.nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def without(self, *tensors: torch.Tensor) -> None:
        """Do not count these."""
        self.drop(tensor.untyped_storage()._cdata for tensor in tensors)

    def drop(self, storages: Iterable[int]) -> None:
        """Do not count the storages at these addresses."""
        for address in storages:
            self._sizes.pop(address, None)


class LayerMeter:
    """Of a fused layer: what its backward computes again, the attention in that, and the graph of that attention."""

    def __init__(self, cuda: bool, *, forward: bool = False) -> None:
        """With `forward`, the graph of an attention that runs for the first time is counted."""
        self._cuda, self._forward = cuda, forward
        self._again: list[Span] = []
        self.attention_span = Span(cuda)
        self._is_again = False
        self._saved = _Saved()

    @property
    def graph(self) -> int:
        """Bytes that the attention's graph keeps beside what it begins and ends with."""
        return self._saved.bytes

    @property
    def again_seconds(self) -> float | None:
        """What computing again took in all; None if nothing was."""
        parts = [span.seconds() for span in self._again]
        known = [seconds for seconds in parts if seconds is not None]
        return sum(known) if parts and len(known) == len(parts) else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Around what a backward computes again."""
        self._is_again = True
        self._again.append(Span(self._cuda))
        try:
            with self._again[-1].measuring():
                yield
        finally:
            self._is_again = False

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Around the attention core; what it is within `again` counts, where a forward keeps no graph of it."""
        if not self._is_again and not self._forward:
            yield
            return
        with self.attention_span.measuring(), self._saved.hooks():
            yield

    def accounted(self, *tensors: torch.Tensor) -> None:
        """These are kept whatever the graph keeps."""
        self._saved.without(*tensors)


class GraphMeter:
    """Of a layer that is not fused: how long its forward takes, and what its graph keeps."""

    def __init__(self) -> None:
        self.span = Span(False)
        # Bytes of the layer's input.
        self.given = 0
        self._saved = _Saved()

    @property
    def graph(self) -> int:
        """Bytes that the layer keeps from forward to backward."""
        return self._saved.bytes

    @contextmanager
    def watching(self, module: torch.nn.Module) -> Iterator[None]:
        """Within it, forwards of the module are measured."""
        running: list[Any] = []
        weights: list[int] = []

        def before(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            self.span, self.given = Span(x.is_cuda), x.nbytes
            # Now, while they are whole: sharding frees what it has gathered before `after` runs.
            weights[:] = [p.untyped_storage()._cdata for p in module.parameters()]
            running[:] = [self._saved.hooks(), self.span.measuring()]
            for context in running:
                context.__enter__()

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            for context in reversed(running):
                context.__exit__(None, None, None)
            running.clear()
            self._saved.drop(weights)

        handles = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

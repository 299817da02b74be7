"""Tensors that wait for their backward in host memory, copied there and back while the device computes.

One stream copies out, another back in. What was copied out last is wanted first, so while the backward of one layer
runs, and no longer needs most memory, the copy of the one before it begins. Host memory is pinned and used again.
"""

import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import torch

Tensor = torch.Tensor
# Copies out that may be under way when the next begins; the tensors that they copy are held until then.
IN_FLIGHT = 2


def buffer_size(size: int) -> int:
    """Bytes of host memory that so many bytes take: the next power of two, as torch pins it."""
    return 1 << max(0, size - 1).bit_length()


class _Buffers:
    """Host memory, pinned for a GPU; at most `budget` bytes unless more are in use."""

    def __init__(self, pinned: bool, budget: int) -> None:
        self._pinned, self._budget = pinned, budget
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.bytes = 0

    def take(self, size: int) -> Tensor:
        """So many bytes [size], of a buffer that may have more."""
        whole = buffer_size(size)
        if not self._free[whole]:
            for other, buffers in self._free.items():
                while buffers and self.bytes + whole > self._budget:
                    buffers.pop()
                    self.bytes -= other
            self.bytes += whole
            self._free[whole].append(torch.empty(whole, dtype=torch.uint8, pin_memory=self._pinned))
        return self._free[whole].pop()

    def give(self, buffers: Sequence[Tensor]) -> None:
        """These are free again."""
        for buffer in buffers:
            self._free[buffer.numel()].append(buffer)


class Host:
    """Where layers of one device park tensors."""

    def __init__(self, device: torch.device, budget: int) -> None:
        self.device = device
        self.buffers = _Buffers(device.type == "cuda", budget)
        self.out = self.back = None
        if device.type == "cuda":
            self.out, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
        self._parked: list[weakref.ref[Parked]] = []
        self._in_flight: deque[tuple[Any, Sequence[Tensor]]] = deque()

    def park(self, tensors: Sequence[Tensor]) -> "Parked":
        """Copy tensors to host memory; they may be dropped by the caller at once, and not be written to."""
        dense = [tensor.detach().contiguous() for tensor in tensors]
        buffers = [self.buffers.take(tensor.nbytes) for tensor in dense]
        parked = Parked(self, dense, buffers)
        if self.out is not None:
            self.out.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.out):
                parked.copy_out(dense)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
                event.record(self.out)
            self._in_flight.append((event, dense))
            while len(self._in_flight) > IN_FLIGHT:
                done, _ = self._in_flight.popleft()
                torch.cuda.current_stream(self.device).wait_event(done)
        else:
            parked.copy_out(dense)
        self._parked.append(weakref.ref(parked))
        return parked

    def land(self) -> None:
        """All that is copied out is there, and nothing is held for it; what comes next may take that memory."""
        while self._in_flight:
            done, _ = self._in_flight.popleft()
            torch.cuda.current_stream(self.device).wait_event(done)

    def before(self, parked: "Parked") -> "Parked | None":
        """What was parked before something that is taken now, and has not been taken yet."""
        while self._parked:
            other = self._parked.pop()()
            if other is parked:
                break
        while self._parked:
            other = self._parked[-1]()
            if other is not None and not other.is_fetched:
                return other
            self._parked.pop()
        return None


class Parked:
    """Some tensors in host memory."""

    def __init__(self, host: Host, tensors: Sequence[Tensor], buffers: list[Tensor]) -> None:
        self._host, self._buffers = host, buffers
        self._like = [(tensor.shape, tensor.dtype) for tensor in tensors]
        self._fetched: list[Tensor] | None = None
        self._event: Any = None
        # Those of a graph that is dropped without a backward too.
        self._release = weakref.finalize(self, host.buffers.give, list(buffers))

    @property
    def is_fetched(self) -> bool:
        """Whether the copy back has begun."""
        return self._fetched is not None

    def _views(self) -> list[Tensor]:
        pairs = zip(self._buffers, self._like, strict=True)
        return [buffer[: shape.numel() * dtype.itemsize].view(dtype).view(shape) for buffer, (shape, dtype) in pairs]

    def copy_out(self, tensors: Sequence[Tensor]) -> None:
        """Begin to fill the host's memory."""
        for view, tensor in zip(self._views(), tensors, strict=True):
            view.copy_(tensor, non_blocking=True)

    def fetch(self) -> None:
        """Begin to copy back."""
        if self._fetched is not None:
            return
        device = self._host.device
        fetched = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self._like]
        back, out = self._host.back, self._host.out
        if back is not None and out is not None:
            # The memory that they got may still be used by what runs, and the copy out may not be over.
            back.wait_stream(torch.cuda.current_stream(device))
            back.wait_stream(out)
            with torch.cuda.stream(back):
                for tensor, view in zip(fetched, self._views(), strict=True):
                    tensor.copy_(view, non_blocking=True)
                    # In case that nobody takes it.
                    tensor.record_stream(back)
                self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
                self._event.record(back)
        else:
            for tensor, view in zip(fetched, self._views(), strict=True):
                tensor.copy_(view)
        self._fetched = fetched

    def take(self, *, keep: bool) -> list[Tensor]:
        """The tensors, on the device; with `keep` they may be taken again. Raises RuntimeError if they are gone."""
        if not self._release.alive:
            raise RuntimeError(
                "Trying to backward through the graph a second time; specify retain_graph=True if you need to"
            )
        self.fetch()
        fetched, self._fetched = self._fetched, None
        assert fetched is not None, "they were fetched"
        if self._event is not None:
            torch.cuda.current_stream(self._host.device).wait_event(self._event)
        if not keep:
            self._release()
        return fetched

    def fetch_next(self) -> None:
        """Begin to copy back what will be taken after this."""
        other = self._host.before(self)
        if other is not None:
            other.fetch()

"""Tensors that wait for their backward in host memory, copied there and back while the device computes.

One stream copies out, another back in. What was copied out last is wanted first, so when one is taken the copy of the
one before it begins. Host memory is pinned and used again; so is that of the device which tensors come back to, since
between tensors that live longer than the work of a layer there would be no room for its largest ones.
"""

import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

Tensor = torch.Tensor
# Copies out that may be under way when the next begins; the tensors that they copy are held until then.
IN_FLIGHT = 2


def buffer_size(size: int) -> int:
    """Bytes of host memory that so many bytes take: the next power of two, as torch pins it."""
    return 1 << max(0, size - 1).bit_length()


class _Buffers:
    """Memory that is used again; at most `budget` bytes unless more are in use."""

    def __init__(self, make: Callable[[int], Tensor], budget: int, size_of: Callable[[int], int]) -> None:
        self._make, self._budget, self._size_of = make, budget, size_of
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.bytes = 0

    def take(self, size: int) -> Tensor:
        """So many bytes [size], of a buffer that may have more."""
        whole = self._size_of(size)
        if not self._free[whole]:
            for other, buffers in self._free.items():
                while buffers and self.bytes + whole > self._budget:
                    buffers.pop()
                    self.bytes -= other
            self.bytes += whole
            self._free[whole].append(self._make(whole))
        return self._free[whole].pop()

    def give(self, buffers: Sequence[Tensor]) -> None:
        """These are free again."""
        for buffer in buffers:
            self._free[buffer.numel()].append(buffer)


class Host:
    """Where layers of one device park tensors."""

    def __init__(self, device: torch.device, budget: int) -> None:
        self.device = device
        self.buffers = _Buffers(self._pinned, budget, buffer_size)
        # Of the device: none stays that is not of the size that is wanted.
        self.slots = _Buffers(self._slot, 0, int)
        self.out = self.back = None
        if device.type == "cuda":
            self.out, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
        self._parked: list[weakref.ref[Parked]] = []
        self._in_flight: deque[tuple[Any, Sequence[Tensor]]] = deque()

    def _pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _slot(self, size: int) -> Tensor:
        slot = torch.empty(size, dtype=torch.uint8, device=self.device)
        if self.back is not None:
            # It may be dropped while a copy that nobody waits for is under way.
            slot.record_stream(self.back)
        return slot

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
        # Gives back the device's memory that they were fetched to.
        self._leave: Any = None
        # Those of a graph that is dropped without a backward too.
        self._release = weakref.finalize(self, host.buffers.give, list(buffers))

    @property
    def is_fetched(self) -> bool:
        """Whether the copy back has begun."""
        return self._fetched is not None

    def _views(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(buffers, self._like, strict=True)
        return [buffer[: shape.numel() * dtype.itemsize].view(dtype).view(shape) for buffer, (shape, dtype) in pairs]

    def copy_out(self, tensors: Sequence[Tensor]) -> None:
        """Begin to fill the host's memory."""
        for view, tensor in zip(self._views(self._buffers), tensors, strict=True):
            view.copy_(tensor, non_blocking=True)

    def fetch(self) -> None:
        """Begin to copy back."""
        if self._fetched is not None:
            return
        self.leave()
        slots = [self._host.slots.take(shape.numel() * dtype.itemsize) for shape, dtype in self._like]
        self._leave = weakref.finalize(self, self._host.slots.give, slots)
        pairs = list(zip(self._views(slots), self._views(self._buffers), strict=True))
        back, out = self._host.back, self._host.out
        if back is not None and out is not None:
            # The memory that they got may still be used by what runs, and the copy out may not be over.
            back.wait_stream(torch.cuda.current_stream(self._host.device))
            back.wait_stream(out)
            with torch.cuda.stream(back):
                for tensor, view in pairs:
                    tensor.copy_(view, non_blocking=True)
                self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
                self._event.record(back)
        else:
            for tensor, view in pairs:
                tensor.copy_(view)
        self._fetched = [tensor for tensor, _ in pairs]

    def take(self, *, keep: bool) -> list[Tensor]:
        """The tensors, on the device until `leave`; with `keep` they may be taken again.

        Raises RuntimeError if they are gone.
        """
        if not self._release.alive:
            raise RuntimeError(
                "Trying to backward through the graph a second time; specify retain_graph=True if you need to"
            )
        self.fetch()
        fetched, self._fetched = self._fetched, None
        assert fetched is not None, "they were fetched"
        if self._event is not None:
            torch.cuda.current_stream(self._host.device).wait_event(self._event)
        other = self._host.before(self)
        if other is not None:
            other.fetch()
        if not keep:
            self._release()
        return fetched

    def leave(self) -> None:
        """What was taken is not used by anything that is launched from here on."""
        if self._leave is not None:
            self._leave()

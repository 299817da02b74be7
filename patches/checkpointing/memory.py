"""What memory there is, on a device and for this process."""

import time
from typing import Protocol

import torch

from .budget import Budget

# What the allocator cannot use because of how blocks lie, as a share of what it may take.
FRAGMENTATION = 0.03
# How long it is taken for granted that other processes have what they had, in seconds: to ask, the host has to wait for
# the device. What this process has is known without that.
TRUSTED = 10.0


class Memory(Protocol):
    """A device's memory as this process sees it, in bytes."""

    def total(self) -> int:
        """All that the device has."""

    def capacity(self) -> int:
        """What this process could have allocated at once: what it has reserved and what nobody has."""

    def allocated(self) -> int:
        """What it has allocated now."""

    def peak(self) -> int:
        """The most that it had allocated since `reset`, or since somebody else reset it."""

    def reset(self) -> None:
        """Let `peak` begin anew."""


class Cuda:
    """A GPU's memory, by torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # With its workspace, which is torch's memory too, and stays: it is nothing that a micro-batch takes.
        with torch.cuda.device(device):
            torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]  # torch's
        # What was free and reserved when that was last asked, and when that was.
        self._seen, self._asked = (0, 0), float("-inf")

    def total(self) -> int:
        """All that the device has."""
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def capacity(self) -> int:
        """What this process has reserved and what is free, within the fraction that it was given."""
        now, reserved = time.monotonic(), self._now("reserved_bytes")
        # Where the allocator has taken or given back, somebody waited already.
        if reserved != self._seen[1] or now > self._asked + TRUSTED:
            self._seen, self._asked = (torch.cuda.mem_get_info(self.device)[0], reserved), now
        allowed = self.total() * torch.cuda.get_per_process_memory_fraction(self.device)
        return int((1.0 - FRAGMENTATION) * min(sum(self._seen), allowed))

    def allocated(self) -> int:
        """What torch has handed out now."""
        return self._now("allocated_bytes")

    def _now(self, name: str) -> int:
        # Asked before each micro-batch, while the device waits; torch's other ways sort all that there is to say.
        statistics = torch.cuda.memory_stats_as_nested_dict(self.device)
        return int(statistics[name]["all"]["current"]) if statistics else 0

    def peak(self) -> int:
        """The most that torch had handed out."""
        return int(torch.cuda.max_memory_allocated(self.device))

    def reset(self) -> None:
        """Let `peak` begin anew."""
        torch.cuda.reset_peak_memory_stats(self.device)


def allowed(budget: Budget, memory: Memory) -> int:
    """Bytes that this process may have allocated at once."""
    capacity = memory.capacity()
    if budget.kind == "min":
        return 0
    if budget.kind == "bytes":
        return min(int(budget.value), capacity)
    return min(int(budget.value * memory.total()), capacity) if budget.kind == "share" else capacity

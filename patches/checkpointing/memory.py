"""What memory there is, on a device and for this process."""

from typing import Protocol

import torch

from .budget import Budget

# What the allocator cannot use because of how blocks lie, as a share of what it may take.
FRAGMENTATION = 0.03


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

    def total(self) -> int:
        """All that the device has."""
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def capacity(self) -> int:
        """What this process has reserved and what is free, within the fraction that it was given."""
        free, total = torch.cuda.mem_get_info(self.device)
        allowed = total * torch.cuda.get_per_process_memory_fraction(self.device)
        return int((1.0 - FRAGMENTATION) * min(free + self._now("reserved_bytes"), allowed))

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

"""How much memory a plan may take: what the user allows, and what the device has."""

import os
import re
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

VARIABLE = "SLOTH_MEMORY"
FORMS = "auto, min, a size such as 24GiB, or a share of the device such as 80%"
_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
# What the allocator cannot use because of how blocks lie, as a share of the device's memory.
FRAGMENTATION = 0.03


@dataclass(frozen=True, slots=True)
class Budget:
    """What the user allows: everything that is free, a number of bytes, a share of the device, or as little as goes."""

    kind: Literal["auto", "bytes", "share", "min"] = "auto"
    value: float = 0.0
    text: str = "auto"


def parse(text: str) -> Budget:
    """A budget from its text. Raises ValueError, with a line for the user, for anything else."""
    given = text.strip().lower()
    if given in ("auto", "min"):
        return Budget("auto" if given == "auto" else "min", 0.0, given)
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(%|[a-z]*)", given)
    unit = match[2] if match else ""
    if match and unit == "%" and 0.0 < float(match[1]) <= 100.0:
        return Budget("share", float(match[1]) / 100.0, given)
    if match and unit in _UNITS and float(match[1]) > 0.0:
        size = float(match[1]) * _UNITS[unit]
        # A number without a unit is too easily meant in GiB.
        if unit or size >= 2**20:
            return Budget("bytes", size, given)
    raise ValueError(f"{VARIABLE}={text!r} is not one of: {FORMS}")


def from_environment() -> Budget:
    """What SLOTH_MEMORY says."""
    return parse(os.environ.get(VARIABLE) or "auto")


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

    def total(self) -> int:
        """All that the device has."""
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def capacity(self) -> int:
        """What this process has reserved and what is free, within the fraction that it was given."""
        free, total = torch.cuda.mem_get_info(self.device)
        allowed = total * torch.cuda.get_per_process_memory_fraction(self.device)
        return int(min(free + torch.cuda.memory_reserved(self.device), allowed) - FRAGMENTATION * total)

    def allocated(self) -> int:
        """What torch has handed out now."""
        return int(torch.cuda.memory_allocated(self.device))

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

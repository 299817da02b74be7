"""How much memory the user allows. Imports no torch: the flag is read before that is there."""

import os
import re
from dataclasses import dataclass
from typing import Literal

VARIABLE = "SLOTH_MEMORY"
HOST_VARIABLE = "SLOTH_HOST_MEMORY"
FORMS = "auto, min, a size such as 24GiB, or a share of the device such as 80%"
_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True, slots=True)
class Budget:
    """What the user allows: everything that is free, a number of bytes, a share of the device, or as little as goes."""

    kind: Literal["auto", "bytes", "share", "min"] = "auto"
    value: float = 0.0


def parse(text: str, source: str = VARIABLE) -> Budget:
    """A budget from its text. Raises ValueError, with a line for the user, for anything else."""
    given = text.strip().lower()
    if given in ("auto", "min"):
        return Budget("auto" if given == "auto" else "min")
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(%|[a-z]*)", given)
    unit = match[2] if match else ""
    if match and unit == "%" and 0.0 < float(match[1]) <= 100.0:
        return Budget("share", float(match[1]) / 100.0)
    if match and unit in _UNITS and float(match[1]) > 0.0:
        size = float(match[1]) * _UNITS[unit]
        # A number without a unit is too easily meant in GiB.
        if unit or size >= 2**20:
            return Budget("bytes", size)
    raise ValueError(f"{source}={text!r} is not one of: {FORMS}")


def host_bytes(available: int) -> int:
    """Of so many bytes of host memory, those that tensors may wait in: SLOTH_HOST_MEMORY, and at most half of all.

    Raises ValueError, as `parse` does.
    """
    text = os.environ.get(HOST_VARIABLE) or "auto"
    budget = Budget("min") if text.strip() == "0" else parse(text, HOST_VARIABLE)
    wanted = {"auto": available / 2, "min": 0, "bytes": budget.value, "share": budget.value * available}[budget.kind]
    return int(min(wanted, available / 2))


def from_environment() -> Budget:
    """What SLOTH_MEMORY says. Raises ValueError, as `parse` does."""
    return parse(os.environ.get(VARIABLE) or "auto")

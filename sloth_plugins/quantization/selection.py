"""Which linear layers stay in 16 bits: a knapsack of what each costs in 4 bits, under a budget of bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..errors import SlothError

# Projections of one input are one matrix in vLLM, which holds it whole in 4 bits or in 16, by the joint name.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
BUDGET = re.compile(r"\+?\s*(\d+(?:\.\d+)?)\s*(%|[kmg]?i?b)?", re.IGNORECASE)
# Bytes are counted in so many parts of the budget, rounded up: what is chosen never goes beyond it.
STEPS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One thing that is in 4 bits or in 16 as a whole: linear layers by their paths."""

    names: tuple[str, ...]
    score: float
    extra: int
    """Bytes that 16 bits take beyond 4."""


def budget_bytes(text: str, all_four_bit: int) -> int:
    """`10%` of a checkpoint of `all_four_bit` bytes, or `600MiB`, in bytes. Raises SlothError for anything else."""
    match = BUDGET.fullmatch(text.strip())
    if match is None:
        raise SlothError(
            f"--budget {text!r} is not understood; it is a share of the 4-bit model, 10%, or bytes, 600MiB"
        )
    number, unit = float(match[1]), (match[2] or "").upper()
    return int(all_four_bit * number / 100 if unit == "%" else number * UNITS[unit])


def grouped(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Paths by what they belong to: projections that are one in vLLM under its joint name, others by themselves."""
    joint = {part: fused for fused, parts in FUSED.items() for part in parts}
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        parent, dot, leaf = name.rpartition(".")
        key = f"{parent}{dot}{joint.get(leaf, leaf)}"
        found[key] = (*found.get(key, ()), name)
    return found


def choose(choices: Sequence[Choice], budget: int) -> list[Choice]:
    """The choices whose scores sum up highest within `budget` bytes (0-1 knapsack, by dynamic programming)."""
    unit = max(1, -(-budget // STEPS))
    worthy = [choice for choice in choices if choice.score > 0 and choice.extra <= budget]
    room = budget // unit
    best = torch.zeros(room + 1, dtype=torch.float64)
    taken = torch.zeros(len(worthy), room + 1, dtype=torch.bool)
    for row, choice in enumerate(worthy):
        size = -(-choice.extra // unit)
        if size > room:
            continue
        with_it = best[: room + 1 - size] + choice.score
        taken[row, size:] = with_it > best[size:]
        best[size:] = torch.maximum(best[size:], with_it)
    found = []
    for row in reversed(range(len(worthy))):
        if taken[row, room]:
            found.append(worthy[row])
            room -= -(-worthy[row].extra // unit)
    return found[::-1]


def skip_list(kept: Iterable[str], all_names: Iterable[str], outside: Iterable[str]) -> list[str]:
    """`llm_int8_skip_modules`: the paths of all that stays in 16 bits, sorted.

    That is `kept` of `all_names`, the linear layers `outside` decoder layers, `lm_head`, which a given list would
    otherwise leave to 4 bits, and for vLLM the joint name of projections that stay together.
    """
    chosen = set(kept)
    joint = {key for key, names in grouped(all_names).items() if chosen.issuperset(names)}
    return sorted({*chosen, *joint, *outside, "lm_head"})

"""From the ways that each layer has to the plan that costs least time and fits.

A multiple-choice knapsack by dynamic programming over bytes. Layers with the same ways are interchangeable as to time
but not as to memory: what the last ones keep is freed first, and a layer that computes again needs room for it just
then. So of such layers the later ones keep more.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch

from .options import Option, peak

# Steps of the budget that the table has; a plan may miss the best one by a step for each layer.
STEPS = 4096


def solve(
    layers: Sequence[Sequence[Option]], budget: int, after: int, host_budget: int = 0, births: Sequence[int] = ()
) -> list[Option] | None:
    """One option for each layer, the sum of their seconds least, such that `peak` is at most `budget` bytes.

    Those that use the host are taken only for the first layers, as many as its budget allows, and never for the last.
    None if nothing fits.
    """
    allowed = _within_host(layers, host_budget)
    room = budget - after
    if room < 0:
        return None
    step = max(1, -(-room // STEPS))
    best, choices = _table(allowed, room // step, step)
    seen = None
    for size in range(room // step, -1, -1):
        seconds = best[size].item()
        if seconds == float("inf"):
            return None
        if seconds == seen:
            continue
        seen = seconds
        # The smallest budget that costs no more time.
        least = int(torch.searchsorted(-best, torch.tensor(-seconds, dtype=best.dtype)))
        plan = _late_first(allowed, _taken(allowed, choices, least, step))
        if peak(plan, after, births) <= budget:
            return plan
    return None


def tightest(layers: Sequence[Sequence[Option]], host_budget: int = 0) -> list[Option]:
    """The plan that takes the least memory of the device."""
    return [min(options, key=lambda o: (o.kept, o.seconds)) for options in _within_host(layers, host_budget)]


def _within_host(layers: Sequence[Sequence[Option]], host_budget: int) -> list[list[Option]]:
    allowed, left = [], host_budget
    for index, options in enumerate(layers):
        largest = max((option.host for option in options), default=0)
        fits = 0 < largest <= left and index < len(layers) - 1
        left -= largest if fits else 0
        allowed.append([option for option in options if fits or not option.on_host])
    return allowed


def _table(layers: Sequence[Sequence[Option]], size: int, step: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(least seconds for all layers within 0 to `size` steps, for each layer which option that takes)."""
    best = torch.zeros(size + 1, dtype=torch.float64)
    choices = []
    for options in layers:
        costs = torch.full((len(options), size + 1), float("inf"), dtype=torch.float64)
        for row, option in zip(costs, options, strict=True):
            units = -(-option.kept // step)
            if units <= size:
                row[units:] = best[: size + 1 - units] + option.seconds
        best, choice = costs.min(dim=0)
        choices.append(choice)
    return best, choices


def _taken(layers: Sequence[Sequence[Option]], choices: Sequence[torch.Tensor], size: int, step: int) -> list[Option]:
    taken = []
    for options, choice in zip(reversed(layers), reversed(choices), strict=True):
        option = options[int(choice[size])]
        size -= -(-option.kept // step)
        taken.append(option)
    return taken[::-1]


def _late_first(layers: Sequence[Sequence[Option]], plan: Sequence[Option]) -> list[Option]:
    """The same options, but among layers that have the same ones the later keep more."""
    alike: dict[tuple[Option, ...], list[int]] = defaultdict(list)
    for index, options in enumerate(layers):
        alike[tuple(options)].append(index)
    ordered = list(plan)
    for indices in alike.values():
        for index, option in zip(indices, sorted((plan[i] for i in indices), key=lambda o: o.kept), strict=True):
            ordered[index] = option
    return ordered

"""The picture of a benchmark: the time of a step and the peak of memory, a bar for each variant, a dot for each run."""

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..beside import beside
from .results import Variant
from .variants import PATCHED

COLORS = {PATCHED: "#c2410c"}
OTHER, DOT = "#9aa5b1", "#1f2933"

Chosen = Callable[[list[float]], float]


def draw(path: Path, found: Sequence[Variant], title: str) -> bool:
    """Draw as PNG, written beside and renamed; False, and nothing drawn, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # no pyplot: it would choose a window system

    figure = Figure(figsize=(9.6, 1.5 + 0.55 * len(found)), layout="constrained")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    time, memory = figure.subplots(1, 2, sharey=True)
    times = [[] if v.failed else [1000 * run.seconds for run in v.runs] for v in found]
    peaks = [[] if v.failed else [run.peak_bytes / 2**30 for run in v.runs] for v in found]
    _bars(time, found, times, statistics.median, "time of a step (ms; a dot for each run)", "median {:,.1f}")
    _bars(memory, found, peaks, max, "peak memory (GiB)", "{:,.2f}")
    with beside(path) as partial:
        figure.savefig(partial, format="png", dpi=140)
    return True


def _bars(
    axis: Any, found: Sequence[Variant], values: list[list[float]], chosen: Chosen, label: str, text: str
) -> None:
    """Horizontal bars of what is chosen of the runs, the first on top; each run as a dot, and the bar in words."""
    most = max((value for own in values for value in own), default=1.0)
    for row, (variant, own) in enumerate(zip(found, values, strict=True)):
        if variant.failed:
            axis.text(0.02 * most, row, variant.failed, va="center", color=DOT)
            continue
        bar = chosen(own)
        axis.barh(row, bar, color=COLORS.get(variant.name, OTHER), height=0.6)
        axis.plot(own, [row] * len(own), "o", color=DOT, markersize=3, alpha=0.7)
        axis.text(max(own) + 0.02 * most, row, text.format(bar), va="center")
    axis.set_yticks(range(len(found)), [variant.name for variant in found])
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlim(0, 1.35 * most)
    axis.set_xlabel(label)
    axis.grid(alpha=0.25, axis="x")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)

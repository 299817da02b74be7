"""The picture of a run: losses, learning rate, throughput, memory; only what was logged."""

import importlib.util
import os
import statistics
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from .history import MFU, PEAK, PHASES, PLANNED, SECONDS, SPEED, History, Series
from .summary import settled

FILE = "sloth_statistics.png"
MAKER = "sloth-plugins training statistics"
"""Written into the PNG, so that only our own picture is ever replaced."""
TRAIN, QUIET = "#c2410c", "#6b7785"
EVALS = ("#1d4ed8", "#0f766e", "#7c3aed", "#a16207")
MISSING = "no picture is drawn without matplotlib: pip install 'sloth-plugins[plots]'"

Panel = Callable[[Any, History], None]


def draw(history: History, folder: Path) -> str:
    """Draw FILE into a run's folder; returns a line that says where, or why not.

    It is written beside and renamed. Another's file of that name stays. Raises OSError where it cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return MISSING
    path = folder / FILE
    if path.exists() and not is_ours(path):
        return f"no picture is drawn, since {path} is there and is none of ours"
    figure = _figure(history)
    if figure is None:
        return "no picture is drawn, since nothing was logged twice"
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{FILE}.{os.getpid()}")
    try:
        figure.savefig(beside, format="png", dpi=140, metadata={"Software": MAKER})
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return f"drawn in {path}"


def is_ours(path: Path) -> bool:
    """Whether a picture was drawn here."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MAKER.encode() in file.read(4096)


def _figure(history: History) -> Any:
    """The figure with a panel for each quantity that was logged at two steps at least; None without any."""
    panels = [panel for names, panel in _PANELS if any(len(history.series(name)) > 1 for name in names)]
    if not panels:
        return None
    from matplotlib.figure import Figure  # no pyplot: it would choose a window system
    from matplotlib.ticker import MaxNLocator

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.4 * columns, 3.3 * rows), layout="constrained")
    # Side by side where all fit in rows; an odd one takes a row of its own.
    grid = figure.add_gridspec(rows, columns)
    for i, panel in enumerate(panels):
        is_alone = columns == 2 and i == len(panels) - 1 and i % 2 == 0
        axis = figure.add_subplot(grid[i // columns, :] if is_alone else grid[i // columns, i % columns])
        panel(axis, history)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _line(axis: Any, series: Series, color: str, label: str | None = None, **style: Any) -> None:
    # A single point of a line would not be seen.
    marker = "o" if len(series) < 12 else None
    axis.plot(series.steps, series.values, color=color, label=label, marker=marker, markersize=4, **style)


def _losses(axis: Any, history: History) -> None:
    train, evals = history.series("loss"), history.evals()
    if len(train) > 60:
        axis.plot(train.steps, train.values, color=TRAIN, alpha=0.25, linewidth=0.8)
        _line(axis, _smooth(train), TRAIN, "training (smoothed)", linewidth=1.6)
    else:
        _line(axis, train, TRAIN, "training", linewidth=1.6)
    for (label, evaluation), color in zip(evals.items(), cycle(EVALS), strict=False):
        axis.plot(
            evaluation.steps, evaluation.values, color=color, marker="o", markersize=4, linewidth=1.6, label=label
        )
    # That of reinforcement learning is no logarithm of anything.
    axis.set_ylabel("loss" if history.series("reward") else "loss (nats)")
    axis.set_title("Loss", loc="left")
    if evals or len(train) > 60:
        axis.legend(frameon=False)


def _reward(axis: Any, history: History) -> None:
    reward = history.series("reward")
    axis.plot(reward.steps, reward.values, color=TRAIN, alpha=0.25, linewidth=0.8)
    _line(axis, _smooth(reward), TRAIN, linewidth=1.6)
    axis.set_ylabel("reward (smoothed)")
    axis.set_title("Reward", loc="left")


def _phases(axis: Any, history: History) -> None:
    found = {phase: history.series(f"{phase}_seconds") for phase in PHASES}
    for (phase, series), color in zip(found.items(), (TRAIN, *EVALS), strict=True):
        if series:
            _line(axis, series, color, phase, linewidth=1.6)
    _from_nothing(axis, *found.values())
    axis.set_ylabel("seconds a step")
    axis.set_title("Where the time goes", loc="left")
    axis.legend(frameon=False)


def _rate(axis: Any, history: History) -> None:
    from matplotlib.ticker import MaxNLocator

    _line(axis, history.series("learning_rate"), QUIET, linewidth=1.6)
    axis.yaxis.set_major_formatter(lambda value, _: _scientific(value))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    _from_nothing(axis, history.series("learning_rate"))
    axis.set_ylabel("learning rate")
    axis.set_title("Learning rate", loc="left")


def _speed(axis: Any, history: History) -> None:
    speed, mfu = history.series(SPEED), settled(history.series(MFU))
    shown = speed or history.series(SECONDS)
    _line(axis, shown, TRAIN, linewidth=1.6)
    _from_nothing(axis, shown)
    if speed:
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_ylabel("tokens/s per device" if speed else "seconds a step")
    share = f" (MFU {statistics.median(mfu):.1%})" if mfu else ""
    axis.set_title(f"{'Throughput' if speed else 'Time a step'}{share}", loc="left")


def _memory(axis: Any, history: History) -> None:
    peak, planned = history.series(PEAK), history.series(PLANNED)
    _line(axis, peak, TRAIN, "peak", linewidth=1.6)
    if planned:
        _line(axis, planned, QUIET, "planned", linewidth=1.6, linestyle="--")
        axis.legend(frameon=False, loc="lower right")
    _from_nothing(axis, peak, planned)
    axis.set_ylabel("memory (GiB)")
    axis.set_title("Peak memory", loc="left")


def _scientific(value: float) -> str:
    """Such as 1.5e-4."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def _from_nothing(axis: Any, *shown: Series) -> None:
    """An axis that begins at 0, with room above."""
    most = max((value for series in shown for value in series.values), default=0.0)
    axis.set_ylim(0, 1.1 * most if most > 0 else 1)


_PANELS: tuple[tuple[tuple[str, ...], Panel], ...] = (
    (("reward",), _reward),
    (("loss", "eval_loss"), _losses),
    (("learning_rate",), _rate),
    ((SPEED, SECONDS), _speed),
    ((PEAK,), _memory),
    (tuple(f"{phase}_seconds" for phase in PHASES), _phases),
)


def _smooth(series: Series) -> Series:
    """Means over a window of about a thirtieth of the run around each point."""
    half = max(1, len(series) // 60)
    values = series.values
    means = [sum(near) / len(near) for i in range(len(values)) if (near := values[max(0, i - half) : i + half + 1])]
    return Series(series.steps, means)

"""The table at the end of a training, in lines."""

import statistics
from collections.abc import Iterator

from ..report import columns
from .history import MFU, PEAK, PHASES, PLANNED, SAMPLED, SECONDS, SPEED, History, Series


def lines(history: History) -> list[str]:
    """A first line that says how long the run was, and a row for everything that was logged."""
    return [_head(history), *columns(list(_rows(history)))]


def _head(history: History) -> str:
    steps = max([history.step, *(int(entry.get("step") or 0) for entry in history.entries)])
    seconds = history.last("train_runtime")
    if seconds is None:
        return f"{steps} steps"
    measured = _measured(history.series(SECONDS))
    # Trainer's time is that of the last part of a run that was resumed; the steps' own are rounded.
    if measured > 1.05 * seconds:
        return f"{steps} steps in {_duration(measured)} of training, resumed"
    return f"{steps} steps in {_duration(seconds)}"


def _measured(series: Series) -> float:
    """The seconds of all steps, of which those since the last entry are in each."""
    since = zip(series.values, series.steps, [0, *series.steps], strict=False)
    return sum(value * (step - last) for value, step, last in since)


def _shares(history: History) -> dict[str, float]:
    """The part of all steps' time that went into each phase, and the rest; nothing where no phase was measured."""
    seconds = history.series(SECONDS)
    since = {step: step - last for step, last in zip(seconds.steps, [0, *seconds.steps], strict=False)}

    def spent(series: Series) -> float:
        return sum(value * since.get(step, 0) for value, step in zip(series.values, series.steps, strict=True))

    whole = spent(seconds)
    found = {phase: spent(history.series(f"{phase}_seconds")) for phase in PHASES}
    shares = {phase: part / whole for phase, part in found.items() if part > 0 and whole > 0}
    return {**shares, "the rest": max(0.0, 1 - sum(shares.values()))} if shares else {}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _rows(history: History) -> Iterator[tuple[str, str]]:
    for label, series in {"training": history.series("loss"), **history.evals()}.items():
        if series:
            yield f"{label} loss", _loss(series)
    if reward := history.series("reward").values:
        edge = -(-len(reward) // 10)
        first, last = statistics.fmean(reward[:edge]), statistics.fmean(reward[-edge:])
        yield "reward", f"{first:.3f} in the first tenth, {last:.3f} in the last"
    seconds, speed, sampled, mfu = (settled(history.series(name)) for name in (SECONDS, SPEED, SAMPLED, MFU))
    if seconds:
        among = f", {_time(min(seconds))} to {_time(max(seconds))}" if len(seconds) > 1 else ""
        yield "time a step", f"{_time(statistics.median(seconds))}{among}"
    if shares := _shares(history):
        yield "where it went", ", ".join(f"{phase} {share:.0%}" for phase, share in shares.items())
    if speed:
        rollouts = f", {statistics.median(sampled):,.0f} sampled in rollouts" if sampled else ""
        yield "tokens a second", f"{statistics.median(speed):,.0f} on each device{rollouts}"
    if mfu:
        yield "MFU", f"{statistics.median(mfu):.1%} of the card's peak"
    peak, planned = history.series(PEAK).values, history.series(PLANNED).values
    if peak:
        of = f", {max(planned):.2f} planned" if planned else ""
        yield "peak memory", f"{max(peak):.2f} GiB{of}"


def _loss(series: Series) -> str:
    values = series.values
    if len(values) == 1:
        return f"{values[0]:.4f}"
    lowest, step = min(zip(values, series.steps, strict=True))
    return f"{values[0]:.4f} at first, {values[-1]:.4f} at last, lowest {lowest:.4f} at step {step}"


def settled(series: Series) -> list[float]:
    """Without the first, in which kernels are compiled, where there are others."""
    return series.values[1:] or series.values


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"

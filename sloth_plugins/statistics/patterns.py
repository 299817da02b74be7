"""Three things that go wrong in training and can be seen in the losses, with what to try; each is named once."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .history import Entry, History

WINDOW = 10
"""Logged losses that are looked at together."""
SWING = 0.35
"""How far a loss goes up and down, as a share of its level, when it swings; small batches alone do about half of it."""
BLOWN = 0.2
"""A training loss that is higher than at first by more than this share has a learning rate that is too high as well."""
FALL = 0.02
"""A loss that has fallen by less than this share of itself has not fallen."""
RISE = 0.01
"""An eval loss that is higher than its lowest by more than this share has risen."""
SHARE = 0.2
"""The part of a run after which a loss should have fallen."""


@dataclass(slots=True)
class Watch:
    """Sees what is logged, entry by entry; `max_steps` is 0 where the length of the run is not known."""

    max_steps: int = 0
    _losses: list[float] = field(default_factory=list)
    _evals: dict[str, list[tuple[int, float, float]]] = field(default_factory=dict)
    """By the data's name: step, eval loss, train loss around it."""
    _named: set[str] = field(default_factory=set)

    def see(self, entry: Entry) -> Iterator[str]:
        """A line for each pattern that this entry shows for the first time."""
        found = History([entry])
        loss, step = found.last("loss"), int(entry.get("step") or 0)
        if loss is not None and "reward" not in entry:  # the loss of reinforcement learning says nothing of this kind
            self._losses.append(loss)
            if self._first(self._swings() or self._rises(), "swinging"):
                what = f"swings by {self._swing():.0%} of its level and does not fall"
                if self._rises():
                    what = f"rises, from {self._start():.3f} to {self._now():.3f}"
                yield (
                    f"step {step}: the training loss {what}; try a lower learning rate{_rate(entry)}, a longer "
                    "warmup, or larger batches (gradient_accumulation_steps)"
                )
            elif "swinging" not in self._named and self._first(self._stays(step), "not falling"):
                yield (
                    f"step {step}: the training loss has not fallen, from {self._start():.3f} to {self._now():.3f}; "
                    f"check that labels are not masked and the data is what you think; else try a higher learning "
                    f"rate{_rate(entry)} or a higher LoRA rank"
                )
        for name, series in found.evals().items() if self._losses else ():
            evals, eval_loss = self._evals.setdefault(name, []), series.values[-1]
            evals.append((step, eval_loss, self._now()))
            if self._first(_overfits(evals), "overfitting"):
                best, lowest, _ = min(evals, key=lambda item: item[1])
                yield (
                    f"step {step}: the {name} loss rises ({lowest:.3f} at step {best}, now {eval_loss:.3f}) while the "
                    "training loss falls: overfitting; stop at the lowest (load_best_model_at_end=True with "
                    "EarlyStoppingCallback), or try fewer epochs, more data, LoRA dropout or a lower rank"
                )

    def _first(self, seen: bool, name: str) -> bool:
        if not seen or name in self._named:
            return False
        self._named.add(name)
        return True

    def _start(self) -> float:
        """The level at which training began."""
        return statistics.fmean(self._losses[: WINDOW // 2])

    def _now(self) -> float:
        """The level now."""
        return statistics.fmean(self._losses[-WINDOW // 2 :])

    def _swing(self) -> float:
        """Deviation of the last losses from a line through them, as a share of their level.

        A loss that is near nothing beside where it began has a fifth of that as its level.
        """
        last = self._losses[-WINDOW:]
        slope, start = statistics.linear_regression(range(len(last)), last)
        rest = [value - start - slope * i for i, value in enumerate(last)]
        return statistics.pstdev(rest) / max(statistics.fmean(last), 0.2 * self._start())

    def _swings(self) -> bool:
        if len(self._losses) < 2 * WINDOW or self._start() <= 0:
            return False
        # Windows side by side, of which the last is that of now.
        ends = range(len(self._losses), WINDOW - 1, -WINDOW)
        now, *before = (statistics.fmean(self._losses[end - WINDOW : end]) for end in list(ends)[:WINDOW])
        return self._swing() > SWING and now > 0.95 * min(before)

    def _rises(self) -> bool:
        """Far above where it began, as it is before it swings or after it has blown up."""
        return len(self._losses) >= 2 * WINDOW and self._now() > (1 + BLOWN) * self._start() > 0

    def _stays(self, step: int) -> bool:
        if len(self._losses) < 2 * WINDOW or step < SHARE * self.max_steps or self._start() <= 0:
            return False
        quarter = min(len(self._losses) // 4, 5 * WINDOW)
        first, last = self._losses[:quarter], self._losses[-quarter:]
        fall = statistics.fmean(first) - statistics.fmean(last)
        error = ((statistics.variance(first) + statistics.variance(last)) / quarter) ** 0.5
        return fall < FALL * statistics.fmean(first) and fall < 2 * error + 1e-12


def _overfits(evals: Sequence[tuple[int, float, float]]) -> bool:
    """Two evaluations have passed since the lowest, each higher than the one before, and the training went on."""
    if len(evals) < 3:
        return False
    before, middle, now = (loss for _, loss, _ in evals[-3:])
    _, lowest, level_then = min(evals, key=lambda item: item[1])
    falls_on = evals[-1][2] < level_then
    return before < middle < now and now > lowest + RISE * abs(lowest) and falls_on


def _rate(entry: Entry) -> str:
    rate = History([entry]).last("learning_rate")
    return "" if rate is None else f" (it is {rate:.2g})"


def seen_in(history: History) -> list[str]:
    """The lines of a whole run."""
    watch = Watch(history.max_steps)
    return [line for entry in history.entries for line in watch.see(entry)]

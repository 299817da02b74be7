"""What the runs of a benchmark say: medians, how far they spread, ratios where these are clear, and equal losses."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..demo.results import TOLERANCES
from .variants import STOCK

WARM = 0.2
"""The part of a run's steps in which kernels are compiled and plans are made; it is left out."""

STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles of Student's t for 1 to 9 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Run:
    """One process: seconds from step to step, losses in nats as they were logged, bytes at the most.

    `failed` says in a word why there is nothing of that.
    """

    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    failed: str = ""

    @property
    def seconds(self) -> float:
        """The middle step."""
        times = self.step_seconds
        return statistics.median(times[min(max(1, int(WARM * len(times))), len(times) - 1) :])


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast as stock: the median of the rounds, the least and the most."""

    value: float
    low: float
    high: float
    is_clear: bool


@dataclass(frozen=True, slots=True)
class Variant:
    """All runs of one variant, in the order of the rounds."""

    name: str
    runs: list[Run]

    @property
    def failed(self) -> str:
        """Why there is nothing to compare; empty if there is."""
        return next((run.failed for run in self.runs if run.failed), "")

    @property
    def seconds(self) -> float:
        """The median of the runs' middle steps."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def spread(self) -> float:
        """The distance between the fastest and the slowest run, as a share of the median."""
        times = [run.seconds for run in self.runs]
        return (max(times) - min(times)) / self.seconds

    @property
    def peak_bytes(self) -> int:
        """The most that a run took."""
        return max(run.peak_bytes for run in self.runs)


def loss_difference(variant: Variant, stock: Variant) -> float:
    """The largest difference of two logged losses, in nats; infinite if one is missing or no number."""
    pairs = list(zip(variant.runs, stock.runs, strict=True))
    if any(len(a.losses) != len(b.losses) or not a.losses for a, b in pairs):
        return math.inf
    differences = [abs(x - y) for a, b in pairs for x, y in zip(a.losses, b.losses, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def ratio(variant: Variant, stock: Variant) -> Ratio:
    """Round by round, since what slows a machine for a while slows both; of two rounds or more.

    It is clear where Student's 95 % interval of the mean logarithm leaves out that of 1.
    """
    found = [b.seconds / a.seconds for a, b in zip(variant.runs, stock.runs, strict=True)]
    logarithms = [math.log(value) for value in found]
    error = statistics.stdev(logarithms) / math.sqrt(len(found))
    is_clear = abs(statistics.fmean(logarithms)) > STUDENT[min(len(found) - 2, len(STUDENT) - 1)] * error
    return Ratio(statistics.median(found), min(found), max(found), is_clear)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What may be said of a variant beside stock; a ratio only where it is clear and the losses agree."""

    text: str
    ratio: Ratio | None = None
    agrees: bool = True


def verdict(variant: Variant, stock: Variant, dtype: str) -> Verdict:
    """Of a variant that did not fail, and is not stock."""
    if stock.failed:
        return Verdict("nothing to compare with")
    difference, tolerance = loss_difference(variant, stock), TOLERANCES.get(dtype, max(TOLERANCES.values()))
    if not difference <= tolerance:
        return Verdict(f"no ratio: losses differ by {difference:.1e}, more than {tolerance:g}", agrees=False)
    if len(stock.runs) < 2:
        return Verdict("no ratio: one round shows no spread")
    found = ratio(variant, stock)
    if not found.is_clear:
        return Verdict(f"no ratio: the rounds give {found.low:.2f} to {found.high:.2f}")
    return Verdict(f"{found.value:.2f} times as fast ({found.low:.2f} to {found.high:.2f})", found)


def table(found: Sequence[Variant], dtype: str, tokens: int) -> list[tuple[str, ...]]:
    """Rows of text, a header first; `tokens` are those of a step."""
    rows: list[tuple[str, ...]] = [
        ("", "ms/step", "spread", "tokens/s", "peak GiB", "loss difference", "against stock")
    ]
    stock = found[0]
    for variant in found:
        if variant.failed:
            rows.append((variant.name, variant.failed, "", "", "", "", ""))
            continue
        compared = variant.name != STOCK and not stock.failed
        rows.append(
            (
                variant.name,
                f"{1000 * variant.seconds:.1f}",
                f"{variant.spread:.1%}",
                f"{tokens / variant.seconds:,.0f}",
                f"{variant.peak_bytes / 2**30:.2f}",
                f"{loss_difference(variant, stock):.1e}" if compared else "",
                verdict(variant, stock, dtype).text if variant.name != STOCK else "",
            )
        )
    return rows


def as_json(found: Sequence[Variant], dtype: str, tokens: int) -> list[dict[str, Any]]:
    """All of it, raw times too. Seconds, bytes, nats."""
    result = []
    for variant in found:
        entry: dict[str, Any] = {"variant": variant.name, "failed": variant.failed or None}
        if not variant.failed:
            entry |= {
                "step_seconds": variant.seconds,
                "spread": variant.spread,
                "tokens_per_second": tokens / variant.seconds,
                "peak_bytes": variant.peak_bytes,
            }
        if variant.name != STOCK and not variant.failed and not found[0].failed:
            difference, said = loss_difference(variant, found[0]), verdict(variant, found[0], dtype)
            entry |= {
                "loss_difference": difference if math.isfinite(difference) else None,
                "losses_agree": said.agrees,
                "ratio": None if said.ratio is None else asdict(said.ratio),
                "verdict": said.text,
            }
        entry["runs"] = [
            {"step_seconds": run.step_seconds, "losses": run.losses, "peak_bytes": run.peak_bytes}
            for run in variant.runs
        ]
        result.append(entry)
    return result

"""What the demo makes of its four runs: the comparison, the table, the plot and summary.json."""

import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from sloth_plugins.beside import beside

TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}  # largest allowed difference of two losses, in nats
APPLIED = re.compile(r"\s[1-9]\d*\s+applied\b")  # a row of the report: patch, number of modules, state


@dataclass(frozen=True, slots=True)
class Run:
    """One fine-tuning: `losses` in nats by step, times in seconds, `peak_mib` in MiB (None if not measured)."""

    method: str
    patched: bool
    losses: list[float]
    seconds: float
    step_seconds: list[float]
    peak_mib: float | None
    peak_what: str
    device: str
    dtype: str
    evidence: list[str]  # lines of the patch report that name an applied patch

    @property
    def name(self) -> str:
        """Such as `QLoRA patched`."""
        return f"{self.method} {'patched' if self.patched else 'stock'}"

    @property
    def median_step_ms(self) -> float:
        """Milliseconds of the middle step: unlike the total, it leaves out what the first steps compile."""
        return sorted(self.step_seconds)[len(self.step_seconds) // 2] * 1000


def read_run(method: str, patched: bool, written: Path, log: Path) -> Run:
    """A run from the JSON that the training script wrote and the log of its process."""
    result: dict[str, Any] = json.loads(written.read_text())
    return Run(
        method=method,
        patched=patched,
        losses=result["losses"],
        seconds=result["seconds"],
        step_seconds=result["step_seconds"],
        peak_mib=result["peak_memory"]["mib"],
        peak_what=result["peak_memory"]["what"],
        device=result["device"],
        dtype=result["dtype"],
        evidence=applied_lines(log),
    )


def applied_lines(log: Path) -> list[str]:
    """The rows, each once, that say `applied` of at least one module in the patch reports of a log.

    A report begins with a line that starts with `sloth-plugins`; nothing before the first counts.
    """
    lines = log.read_text(errors="replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("sloth-plugins")), len(lines))
    return list(dict.fromkeys(line.strip() for line in lines[start:] if APPLIED.search(line)))


def largest_difference(stock: Run, patched: Run) -> float:
    """The largest absolute difference of the two losses of a step; infinite if steps are missing or no number."""
    if len(stock.losses) != len(patched.losses) or not stock.losses:
        return math.inf
    differences = [abs(a - b) for a, b in zip(stock.losses, patched.losses, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def problems(pairs: Sequence[tuple[Run, Run]], require_patches: bool) -> list[str]:
    """One line for everything that makes the comparison fail or void; empty when the demo passed."""
    found = []
    for stock, patched in pairs:
        tolerance = TOLERANCES[stock.dtype]
        difference = largest_difference(stock, patched)
        if difference > tolerance:
            found.append(
                f"{patched.method}: losses differ by up to {difference:.2e}, more than {tolerance:g} ({stock.dtype})"
            )
        if stock.evidence:
            found.append(f"{stock.name}: patches were applied to the run that should have none")
        if require_patches and not patched.evidence:
            found.append(
                f"{patched.name}: its log reports no applied patch; is sloth-plugins installed in this Python?"
            )
    return found


def table(pairs: Sequence[tuple[Run, Run]], title: str) -> Table:
    """The comparison, one row a run; `max diff` is the largest difference of two losses of the same step."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    result.add_column("run", no_wrap=True)
    for heading in ("first loss", "last loss", "max diff", "seconds", "ms/step", "peak MiB"):
        result.add_column(heading, justify="right", no_wrap=True)
    for stock, patched in pairs:
        for run in (stock, patched):
            result.add_row(
                run.name,
                f"{run.losses[0]:.4f}",
                f"{run.losses[-1]:.4f}",
                f"{largest_difference(stock, patched):.1e}" if run.patched else "",
                f"{run.seconds:.1f}",
                f"{run.median_step_ms:.0f}",
                "?" if run.peak_mib is None else f"{run.peak_mib:,.0f}",
            )
        result.add_section()
    return result


def write_summary(path: Path, pairs: Sequence[tuple[Run, Run]], prepared: Mapping[str, Any], found: list[str]) -> None:
    """Everything the table and the plot show, as JSON; takes the place of an older one only when whole."""
    summary = {
        "passed": not found,
        "problems": found,
        "model": {name: prepared[name] for name in ("description", "parameters", "pairs", "key")},
        "tolerances": TOLERANCES,
        "comparisons": [
            {
                "method": patched.method,
                "largest_loss_difference": largest_difference(stock, patched),
                "runs": [
                    {name: getattr(run, name) for name in ("name", *Run.__dataclass_fields__)}
                    for run in (stock, patched)
                ],
            }
            for stock, patched in pairs
        ],
    }
    with beside(path) as partial:
        partial.write_text(json.dumps(summary, indent=1))


def plot(path: Path, pairs: Sequence[tuple[Run, Run]]) -> bool:
    """Draw both curves of every method as PNG; False, and nothing drawn, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # no pyplot: it would choose a window system

    figure = Figure(figsize=(5.2 * len(pairs), 4), layout="constrained")
    axes = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
    for axis, (stock, patched) in zip(axes, pairs, strict=True):
        steps = range(1, len(stock.losses) + 1)
        axis.plot(steps, stock.losses, color="#9aa5b1", linewidth=5, label="stock")
        axis.plot(range(1, len(patched.losses) + 1), patched.losses, color="#c2410c", linewidth=1.5, label="patched")
        axis.set_title(f"{stock.method}: largest difference {largest_difference(stock, patched):.1e}", fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    axes[0].set_ylabel("training loss (nats per response token)")
    with beside(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    return True

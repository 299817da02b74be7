"""What stays in 16 bits and why: a table, the same as JSON, and a picture."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..report import byte_size, columns
from .decision import OUTLIER, Decision
from .measuring import Measured
from .picture import draw
from .selection import grouped

NAME = "quantization_report"
OUTLIERS_SHOWN = 12


def write_report(decision: Decision, folder: Path, **facts: Any) -> None:
    """Write quantization_report.json, .txt and, where matplotlib is installed, .png into `folder`."""
    (folder / f"{NAME}.json").write_text(json.dumps(as_json(decision, **facts), indent=1) + "\n", encoding="utf-8")
    (folder / f"{NAME}.txt").write_text(text(decision) + "\n", encoding="utf-8")
    with suppress(ImportError):  # matplotlib is an extra, and the numbers are in the other two
        draw(decision, folder / f"{NAME}.png")


def as_json(decision: Decision, **facts: Any) -> dict[str, Any]:
    """All that is known, by module."""
    found = decision.measurement
    outliers = {linear.name for linear in decision.outliers}
    modules = {
        linear.name: {key: value for key, value in asdict(linear).items() if key != "name"}
        | {"bits": 16 if linear.name in decision.kept else 4, "outliers": linear.name in outliers}
        for linear in found.linears
    }
    return facts | {
        "score": decision.score,
        "tokens": found.tokens,
        "bytes": {
            "all_16_bit": found.all_plain,
            "all_4_bit": found.all_four_bit,
            "budget": decision.budget,
            "extra": decision.extra,
            "total": decision.total,
        },
        "cost": {"all_4_bit": decision.cost(all_four_bit=True), "chosen": decision.cost(), "in_nats": decision.in_nats},
        "llm_int8_skip_modules": decision.skip,
        "modules": modules,
    }


def text(decision: Decision) -> str:
    """The table: what stays in 16 bits, the costliest byte first, and the massive inputs."""
    found, unit = decision.measurement, "nats a token" if decision.in_nats else decision.score
    whole = decision.cost(all_four_bit=True)

    def share(count: int) -> str:
        return f"{100 * count / found.all_four_bit:.1f} %"

    lines = [
        f"{byte_size(found.all_plain)} in 16 bits, {byte_size(found.all_four_bit)} in 4 bits, "
        f"{byte_size(decision.total)} as chosen (+{share(decision.extra)} of +{share(decision.budget)})",
        f"score {decision.score} over {found.tokens} tokens: {whole:.3g} all in 4 bits, {decision.cost():.3g} as "
        f"chosen ({unit}, summed over linear layers)",
        "",
    ]
    rows = [("stays in 16 bits", "cost in 4 bits", "of all", "bytes", "inputs")]
    by_name = {linear.name: linear for linear in found.linears}
    kept = [name for name in by_name if name in decision.kept]
    groups = {key: [by_name[name] for name in names] for key, names in grouped(kept).items()}
    for key, parts in sorted(groups.items(), key=lambda item: -_worth(item[1], decision.score)):
        cost = sum(linear.scores[decision.score] for linear in parts)
        part = f"{100 * cost / whole:.1f} %" if whole else ""
        extra = sum(linear.plain_bytes - linear.packed_bytes for linear in parts)
        rows.append((_named(key, parts), f"{cost:.3g}", part, f"+{byte_size(extra)}", _massive(parts)))
    if not decision.kept:
        rows.append(("nothing: the budget is below the smallest linear layer", "", "", "", ""))
    lines += columns(rows)
    if decision.outliers:
        lines += ["", f"massive inputs (over {OUTLIER:.0f} times what is typical):"]
        shown = [
            (linear.name, f"{linear.ratio:.0f} x", f"channel {linear.channel}", _bits(decision, linear))
            for linear in decision.outliers[:OUTLIERS_SHOWN]
        ]
        lines += columns(shown)
        if len(decision.outliers) > OUTLIERS_SHOWN:
            lines.append(f"  and {len(decision.outliers) - OUTLIERS_SHOWN} more, in {NAME}.json")
    return "\n".join(lines)


def _worth(parts: list[Measured], score: str) -> float:
    return sum(part.scores[score] for part in parts) / sum(part.plain_bytes for part in parts)


def _named(key: str, parts: list[Measured]) -> str:
    leaves = [part.name.rpartition(".")[2] for part in parts]
    return key if len(leaves) == 1 else f"{key.rpartition('.')[0]}.{{{','.join(leaves)}}}"


def _massive(parts: list[Measured]) -> str:
    ratio = max(part.ratio for part in parts)
    return f"massive, {ratio:.0f} x" if ratio >= OUTLIER else ""


def _bits(decision: Decision, linear: Measured) -> str:
    return "stays in 16 bits" if linear.name in decision.kept else "in 4 bits"

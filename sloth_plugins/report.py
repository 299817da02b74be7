"""A report as text: one table, one line for each patch."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from sloth_plugins.registry import Environment, Outcome, Report

from ._version import __version__


def columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows as lines, each column as wide as its widest cell."""
    rows = list(rows)
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def byte_size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def environment_line(environment: Environment) -> str:
    """Device, library versions and number of processes, in one line."""
    parts = [environment.devices[0] if len(set(environment.devices)) == 1 else ", ".join(environment.devices)]
    parts += [
        f"{name} {environment.versions[name]}" for name in ("torch", "transformers") if name in environment.versions
    ]
    parts.append(f"triton {environment.triton}")
    if environment.world_size > 1:
        parts.append(f"{environment.world_size} processes")
    return ", ".join(parts)


def _row(outcome: Outcome, label: str, *, dry: bool) -> tuple[str, ...]:
    state = {"applied": "applies", "skipped": "skips"}.get(outcome.state, outcome.state) if dry else outcome.state
    return label, str(outcome.modules), state, outcome.reason


def _verdicts(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """The compat matrix's verdicts, those of one kind in one line."""
    found: dict[str, list[str]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.tested or "not in the matrix", []).append(outcome.patch)
    return (f"  compat matrix: {verdict} ({', '.join(patches)})" for verdict, patches in found.items())


def _labels(outcomes: Iterable[Outcome]) -> list[str]:
    """`family:patch`; by the architecture's own name where patches of one name are of two members of a family."""
    outcomes = list(outcomes)
    members: dict[tuple[str, str], set[str]] = {}
    for outcome in outcomes:
        members.setdefault((outcome.family, outcome.patch), set()).add(outcome.architecture)
    owners = (o.family if len(members[o.family, o.patch]) == 1 else o.architecture for o in outcomes)
    return [f"{owner}:{outcome.patch}" for owner, outcome in zip(owners, outcomes, strict=True)]


def text(report: Report) -> str:
    """The whole report, for a terminal or a log."""
    head = f"sloth-plugins {__version__} ({environment_line(report.environment)}), selection {report.selection!r}"
    lines = [head]
    if report.outcomes:
        labels = _labels(report.outcomes)
        rows = [_row(*pair, dry=report.dry) for pair in zip(report.outcomes, labels, strict=True)]
        lines += columns([("patch", "modules", "state", "why"), *rows])
        lines += _verdicts(report.outcomes) if report.dry else []
    if report.outcomes and all(outcome.state == "off" for outcome in report.outcomes):
        names = ", ".join(dict.fromkeys(outcome.architecture for outcome in report.outcomes if not outcome.trainer))
        lines.append(f"  nothing that is selected is for this model, which is {names}; it stays stock")
    for tower in report.towers:
        lines.append(f"  {tower} stays stock")
    if report.unknown:
        types = ", ".join(map(repr, report.unknown))
        lines.append(
            f"  no architecture covers model type {types}; what is of it stays stock (`sloth-plugins list` shows all)"
        )
    return "\n".join(lines)


def as_json(report: Report) -> str:
    """The outcomes as JSON, for another program."""
    return json.dumps(
        {
            "selection": report.selection,
            "dry": report.dry,
            "outcomes": [asdict(outcome) for outcome in report.outcomes],
            "unknown": list(report.unknown),
            "towers": list(report.towers),
        },
        indent=2,
    )

"""Rows of a file, checked one by one: what is wrong with a row is counted and told with its line."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SlothError, nearest
from ..processes import say
from .reading import read, unit
from .roles import ROLE_KEYS

NAMED = 5  # lines that a summary names of each kind of problem


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row is left out: its line (from 1; the row's number in parquet), the kind, and what was found."""

    line: int
    kind: str
    detail: str


@dataclass(slots=True)
class RowReport:
    """The good rows of a file, and what was wrong with the others."""

    path: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def summary(self) -> str:
        """How many rows were read and left out, a line for each kind of problem with the first lines that have it."""
        count = len(self.rows)
        lines = [f"{self.path}: {count} row{'s' * (count != 1)} read, {len(self.problems)} left out"]
        kinds: dict[str, list[Problem]] = {}
        for problem in self.problems:
            kinds.setdefault(problem.kind, []).append(problem)
        for kind, found in kinds.items():
            lines.append(f"  {kind}: {len(found)} ({self.first(found)})")
        return "\n".join(lines)

    def first(self, problems: Sequence[Problem]) -> str:
        """The first few problems with their lines, in one line."""
        named = "; ".join(f"{unit(self.path)} {problem.line}: {problem.detail}" for problem in problems[:NAMED])
        return f"{named}; ..." if len(problems) > NAMED else named


def load_rows(
    path: str | Path,
    columns: Mapping[str, type] | Iterable[str] | None = None,
    *,
    optional: Collection[str] = ("input", "system"),
    max_length: int | None = None,
    tokenizer: Any = None,
    strict: bool = False,
) -> Any:
    """The good rows of a .jsonl, .csv or .parquet file as a datasets.Dataset; what is wrong with the others is printed.

    `columns` are those that every row must have, with the type of each where it is not text (`{"messages": list}`);
    without it they are those of the first row. Columns in `optional` may be missing or empty. A row is left out when a
    column is missing, of another type or empty, when it is not Unicode text, or when its text has more than
    `max_length` tokens (characters without a tokenizer). With `strict` the first such row raises SlothError.

    Raises SlothError also when no row is good.
    """
    report = check_rows(path, columns, optional=optional, max_length=max_length, tokenizer=tokenizer, strict=strict)
    if not report.rows:
        raise SlothError(f"no good row in {path}: {report.first(report.problems) or 'it is empty'}")
    if report.problems:
        say(report.summary())
    return _dataset(report)


def check_rows(
    path: str | Path,
    columns: Mapping[str, type] | Iterable[str] | None = None,
    *,
    optional: Collection[str] = ("input", "system"),
    max_length: int | None = None,
    tokenizer: Any = None,
    strict: bool = False,
) -> RowReport:
    """What `load_rows` makes a dataset of: the good rows, and a Problem for each of the others; nothing is printed."""
    report = RowReport(str(path))
    types = dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(columns or (), str)
    required = set(types) - set(optional)
    for line, row in read(path):
        if isinstance(row, dict) and columns is None and not report.rows and not report.problems:
            required = set(row) - set(optional)
        problem = _problem(row, required, types) or _too_long(row, max_length, tokenizer)
        if isinstance(row, dict) and problem is None:
            report.rows.append(row)
            types = {**_types(row), **types}
        elif problem is not None and strict:
            raise SlothError(f"{path}, {unit(path)} {line}: {': '.join(problem)}")
        elif problem is not None:
            report.problems.append(Problem(line, *problem))
    return report


def _types(row: Mapping[str, Any]) -> dict[str, type]:
    return {name: type(value) for name, value in row.items() if value is not None}


def _problem(row: dict[str, Any] | str, required: Collection[str], types: Mapping[str, type]) -> tuple[str, str] | None:
    """The kind of problem and its detail. Columns that nobody named have the type that they first had."""
    if isinstance(row, str):
        return "unreadable", row
    for name in sorted(required):
        if row.get(name) is None:
            return "missing column", f"no {name!r}{nearest(name, row.keys() - {name})}"
    for name, value in row.items():
        kind = types.get(name)
        if value is not None and kind is not None and not _is(value, kind):
            return "wrong type", f"{name!r} is {type(value).__name__}, not {kind.__name__}"
        if name in required and all(isinstance(leaf, str) and not leaf.strip() for leaf in _leaves(value)):
            return "empty text", f"{name!r} is empty"
    if not all(map(_is_unicode, _texts(row))):
        return "unreadable", "characters that are no Unicode text"
    return None


def _too_long(row: dict[str, Any] | str, max_length: int | None, tokenizer: Any) -> tuple[str, str] | None:
    if max_length is None:
        return None
    if tokenizer is None:
        length, what = sum(map(len, _texts(row))), "characters"
    else:
        length, what = sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in _texts(row)), "tokens"
    return ("too long", f"{length} {what}, and at most {max_length} are wanted") if length > max_length else None


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of a type; a whole number may stand for any number."""
    if kind in (int, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def _leaves(value: Any) -> Iterator[Any]:
    """All that a value holds, however deep, but nothings, and roles, without which a message may still be empty."""
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ROLE_KEYS:
                yield from _leaves(item)
    elif value is not None:
        yield value


def _texts(value: Any) -> Iterator[str]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, str))


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _dataset(report: RowReport) -> Any:
    try:
        from datasets import Dataset
    except ImportError:
        raise SlothError(
            "reading rows needs datasets, which is not installed: pip install 'sloth-plugins[trl]'"
        ) from None
    from pyarrow import ArrowException

    names = dict.fromkeys(name for row in report.rows for name in row)
    try:
        return Dataset.from_dict({name: [row.get(name) for row in report.rows] for name in names})
    except (ArrowException, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SlothError(
            f"the rows of {report.path} do not fit together: {reason}; give columns=, with types"
        ) from None

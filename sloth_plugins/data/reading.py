"""Files of rows, read so that every row still knows its line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..errors import SlothError, nearest

# A row, or why it cannot be read, with its number from 1 on.
Numbered = tuple[int, dict[str, Any] | str]


def read(path: str | Path) -> Iterator[Numbered]:
    """The rows of a .jsonl, .csv or .parquet file, one after another.

    Raises SlothError for a file that is not there or is none of these.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        known = ", ".join(READERS)
        raise SlothError(
            f"{path} cannot be read: {path.suffix or 'no suffix'}{nearest(path.suffix, READERS)} ({known})"
        )
    if not path.is_file():
        raise SlothError(f"{path} is no file")
    return READERS[path.suffix.lower()](path)


def unit(path: str | Path) -> str:
    """What the numbers count: lines, where the file has lines."""
    return "row" if Path(path).suffix.lower() == ".parquet" else "line"


def _jsonl(path: Path) -> Iterator[Numbered]:
    with path.open("rb") as file:  # text mode would end lines also at what a string may hold
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if line.lstrip().startswith(b"[") and number == 1:
                raise SlothError(
                    f"{path} is one JSON list, and one object on each line is needed; "
                    "datasets.load_dataset('json', data_files=...) reads lists"
                )
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                yield number, f"not UTF-8 at byte {error.start + 1} of the line"
            except ValueError as error:
                yield number, f"no JSON: {error}"
            else:
                yield number, row if isinstance(row, dict) else f"{type(row).__name__} where an object is needed"


def _csv(path: Path) -> Iterator[Numbered]:
    # What is not UTF-8 comes as lone surrogates, which the checks find in their row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file, _long_fields():
        lines = csv.reader(file, strict=True)
        header = next(lines, [])
        if len(set(header)) < len(header) or not all(header):
            raise SlothError(f"{path} needs a first line with a different name for every column, not {header}")
        while True:
            number = lines.line_num + 1
            try:
                fields = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, f"no CSV: {error}"
                continue
            if len(fields) > len(header):
                yield number, f"{len(fields)} fields, and the header has {len(header)}"
            elif fields:
                yield number, dict(zip_longest(header, fields))


@contextmanager
def _long_fields() -> Iterator[None]:
    """csv refuses fields of more than 128 KiB, which dialogues may have."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Iterator[Numbered]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except ArrowException as error:
        raise SlothError(f"{path} cannot be read as parquet: {' '.join(str(error).split())}") from None


READERS: dict[str, Callable[[Path], Iterator[Numbered]]] = {
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}

"""A marker in each folder that an export writes, which names its files: nothing else is ever removed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import SlothError

MARK = ".sloth-plugins.json"
LOCK = ".lock"


def mark(folder: Path, inputs: str | None) -> None:
    """Record in `folder` what is in it, and what it was made of."""
    record = {"version": __version__, "inputs": inputs, "files": sorted(set(_files(folder)) - {MARK, LOCK})}
    (folder / MARK).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def record(folder: Path) -> dict[str, Any] | None:
    """What `mark` wrote; None where no export wrote the folder."""
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("files"), list) else None


def refuse_others(folder: Path) -> None:
    """Raise SlothError, which names a file, where `folder` holds any that an export did not write."""
    known = record(folder)
    if known is None:
        other = next((path.name for path in sorted(folder.iterdir()) if path.name != LOCK), None)
    else:
        other = min(set(_files(folder)) - {MARK, LOCK, *known["files"]}, default=None)
    if other is not None:
        raise SlothError(f"{folder} holds {other}, which no export wrote, so it is not replaced; choose another folder")


def _files(folder: Path) -> Iterator[str]:
    """Every file below `folder` by its path from there; a link counts as one, wherever it leads."""
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]
        yield from (Path(root, name).relative_to(folder).as_posix() for name in [*files, *links])

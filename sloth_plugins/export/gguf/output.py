"""The folder that GGUF files go to: what is there is kept, a file appears whole, and one process writes at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import SlothError
from ..writing import FULL


def refuse_existing(paths: Iterable[Path], force: bool) -> None:
    """Raise SlothError, with their names, where there are any and nothing says to replace them."""
    there = [str(path) for path in paths if path.exists()]
    if there and not force:
        raise SlothError(f"{', '.join(there)} exists already; name another folder, or add --force (force=True)")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, for this process alone. Raises SlothError while another has it."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise SlothError(f"{folder} is being written by another process; wait for it, or name another folder") from None
    try:
        yield
    finally:
        lock.release()
        (folder / ".lock").unlink(missing_ok=True)


@contextmanager
def telling(out: Path) -> Iterator[None]:
    """Turn the operating system's refusals while writing into one line each."""
    try:
        yield
    except OSError as error:
        # numpy says how much it could write, and not why that was less.
        full = error.errno in FULL or "requested and" in str(error)
        reason = "the disk is full" if full else error.strerror or error
        raise SlothError(f"cannot write {out}: {reason}; nothing half-written is left") from None

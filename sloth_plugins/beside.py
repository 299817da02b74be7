"""A file that has its name only once it is whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def beside(final: Path, *, keep: bool = True) -> Iterator[Path]:
    """A path beside `final` that becomes it when all went well, and is removed otherwise."""
    path = final.with_name(f".{final.name}.partial")
    try:
        yield path
        if keep:
            os.replace(path, final)
    finally:
        path.unlink(missing_ok=True)

"""What the commands print on, and how a user's mistake is printed: one line, and exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from .errors import SlothError

out = Console(soft_wrap=True, highlight=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


@contextmanager
def one_line() -> Iterator[None]:
    """Turn a SlothError into its line and exit code 2."""
    try:
        yield
    except SlothError as error:
        err.print(f"sloth-plugins: {error}", markup=False)
        raise typer.Exit(2) from None

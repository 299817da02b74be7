"""Lines for the user."""

import sys

from ..processes import rank


def say(text: str) -> None:
    """Print to stderr, on the main process."""
    if rank() == 0:
        print(f"sloth-plugins: {text}", file=sys.stderr, flush=True)  # noqa: T201 - whatever logging the script sets up

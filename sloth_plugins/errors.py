"""The one exception that a user's mistake raises, and how near a word is to what was meant."""

import difflib
from collections.abc import Collection, Iterable


class SlothError(Exception):
    """Something that the user must act on; the message is one line that says what."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, or an empty string when none is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def check_known(what: str, given: str, known: Collection[str]) -> None:
    """Raise SlothError, with the nearest known word and all others, for a word that is none of them."""
    if given not in known:
        raise SlothError(f"{what} {given!r} is not known{nearest(given, known)}; there are {', '.join(known)}")

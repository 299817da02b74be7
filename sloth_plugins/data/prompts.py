"""A prompt put together of a row's columns: `{column}`, and `[[ ]]` around what may be missing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from ..errors import SlothError, nearest

_OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Part:
    """Text and columns in turns: `literals[0]`, `columns[0]`, `literals[1]` and so on."""

    literals: tuple[str, ...]
    columns: tuple[str, ...]
    optional: bool

    def text(self, row: Mapping[str, Any]) -> str:
        """The part for one row; empty where it is optional and one of its columns is."""
        values = [as_text(row[column], column) for column in self.columns]
        if self.optional and not all(value.strip() for value in values):
            return ""
        return "".join(literal + value for literal, value in zip(self.literals, [*values, ""], strict=True))


def parse(prompt: str, columns: Sequence[str]) -> list[Part]:
    """The parts of a prompt. Raises SlothError for an unknown column, or brackets that do not close."""
    pieces = _OPTIONAL.split(prompt)
    parts = [_part(piece, prompt, columns, optional=bool(n % 2)) for n, piece in enumerate(pieces) if piece]
    if not any(part.columns for part in parts):
        raise SlothError(f"the prompt {prompt!r} names no column; write one as {{{columns[0]}}}")
    return parts


def as_text(value: Any, column: str) -> str:
    """A cell as text: nothing is the empty text, a number its digits. Raises SlothError for lists and the like."""
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise SlothError(f"column {column!r} holds {type(value).__name__}, where text is needed")
    return str(value)


def _part(piece: str, prompt: str, columns: Sequence[str], *, optional: bool) -> Part:
    try:
        parsed = list(Formatter().parse(piece))
    except ValueError as error:
        raise SlothError(f"the prompt {prompt!r} cannot be read: {error}; write a brace of its own twice") from None
    literals, names = [""], []
    for literal, name, spec, conversion in parsed:
        literals[-1] += literal
        if name is None:
            continue
        if name not in columns or spec or conversion:
            known = ", ".join(columns)
            raise SlothError(
                f"the prompt {prompt!r} names {name!r}, which is no column{nearest(name, columns)} (columns: {known})"
            )
        names.append(name)
        literals.append("")
    if any(bracket in literal for literal in literals for bracket in ("[[", "]]")):
        raise SlothError(f"the prompt {prompt!r} has a [[ or ]] without its other half")
    if optional and not names:
        raise SlothError(f"the optional part [[{piece}]] names no column, so nothing says when to leave it out")
    return Part(tuple(literals), tuple(names), optional)

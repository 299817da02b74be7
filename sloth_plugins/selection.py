"""The SLOTH_PLUGINS grammar: which patches of which architectures the user asks for.

    selection = "" | "0" | "off"                     nothing
              | term { "," term }                    left to right, the last match wins
    term      = "1" | "on"                           every patch that is on by default
              | [ "-" ] arch [ ":" patch { "+" patch } ]

`arch` is the name of an architecture or of its family, `patch` that of a patch; both may be globs (`*`, `?`).
`llama` means Llama's default patches; a patch that is off by default needs its name or a pattern other than a bare
`*`. A selection that begins with an exclusion starts from all defaults.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .errors import SlothError, nearest

VARIABLE = "SLOTH_PLUGINS"
ON = ("1", "on", "true", "yes")
OFF = ("", "0", "off", "false", "no")
PATTERN = re.compile(r"[a-z0-9_*?]+")
TERM = re.compile(r"-?[a-z0-9_*?]+(:[a-z0-9_*?]+(\+[a-z0-9_*?]+)*)?")
FORM = "ARCH[:PATCH[+PATCH...]], for example llama:rms_norm+rope"


@dataclass(frozen=True, slots=True)
class Term:
    """One term: architecture pattern, patch patterns (empty: the defaults), and whether it takes away."""

    text: str
    architecture: str
    patches: tuple[str, ...] = ()
    excludes: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """A parsed selection; without terms it is off. `source` says where it was written, for messages."""

    text: str
    terms: tuple[Term, ...] = ()
    source: str = VARIABLE

    @property
    def is_off(self) -> bool:
        """Whether nothing can be selected."""
        return not self.terms

    @property
    def names_something(self) -> bool:
        """Whether there is a name in it to look up, so that plugins must be loaded to check it."""
        return any(term.architecture != "*" or term.patches for term in self.terms)


@dataclass(frozen=True, slots=True)
class Decision:
    """`named` is True where the user wrote the patch's own name: then it must apply or fail."""

    selected: bool
    named: bool = False


def _readable(part: str) -> str:
    """What was probably meant by a term: names are lower case, with underscores and without spaces."""
    sign, rest = ("-", part[1:]) if part.startswith("-") else ("", part)
    meant = sign + "".join(rest.split()).lower().replace("-", "_")
    return f"; did you mean {meant!r}?" if meant != part and TERM.fullmatch(meant) else ""


def _parse_term(part: str) -> Term:
    if part == "":
        raise SlothError(f"has an empty term; a term is {FORM}")
    if part.lower() in ON:
        return Term(text=part, architecture="*")
    excludes = part.startswith("-")
    architecture, colon, patches = part.removeprefix("-").partition(":")
    names = tuple(patches.split("+")) if colon else ()
    if part.lower() in OFF:
        fault = "cannot be combined with other terms"
    elif not PATTERN.fullmatch(architecture):
        fault = "has no architecture that can be read"
    elif "" in names:
        fault = "has an empty patch"
    else:
        unreadable = next((name for name in names if not PATTERN.fullmatch(name)), None)
        if unreadable is None:
            return Term(text=part, architecture=architecture, patches=names, excludes=excludes)
        fault = f"has a patch {unreadable!r} that cannot be read"
    raise SlothError(f"{part!r} {fault}{_readable(part)}; a term is {FORM}, and 1 or off stand for all or nothing")


def parse(text: str | None, source: str = VARIABLE) -> Selection:
    """Read a selection; raises `SlothError` with the offending term quoted. `source` is where it was written."""
    if text is not None and not isinstance(text, str):
        raise SlothError(f"{source} is {text!r}, not a text such as '1' or 'llama:rope'")
    stripped = (text or "").strip()
    if stripped.lower() in OFF:
        return Selection(stripped, source=source)
    try:
        return Selection(stripped, tuple(_parse_term(part) for part in stripped.split(",")), source)
    except SlothError as error:
        raise SlothError(f"{source}={text!r}: {error}") from None


def decide(selection: Selection, architecture: str, patch: str, *, family: str = "", default: bool = True) -> Decision:
    """Whether `patch` of `architecture` is selected; `default` is what the patch declares."""
    if selection.is_off:
        return Decision(False)
    decision = Decision(selection.terms[0].excludes and default)
    for term in selection.terms:
        if not any(fnmatchcase(name, term.architecture) for name in (architecture, family)):
            continue
        matching = [pattern for pattern in term.patches if fnmatchcase(patch, pattern)]
        if term.patches and not matching:
            continue
        if term.excludes:
            decision = Decision(False)
        elif default or any(pattern != "*" for pattern in matching):
            decision = Decision(True, named=decision.named or patch in matching)
    return decision


def check_names(selection: Selection, catalogue: Mapping[str, Iterable[str]]) -> None:
    """Raise `SlothError` for a term that can match nothing in `catalogue`: patch names by architecture or family."""
    for term in selection.terms:
        architectures = [name for name in catalogue if fnmatchcase(name, term.architecture)]
        if not architectures:
            hint = nearest(term.architecture, catalogue if term.excludes else [*catalogue, *ON])
            raise SlothError(
                f"{selection.source}={selection.text!r}: no architecture matches {term.architecture!r}{hint} "
                f"(known: {', '.join(catalogue) or 'none'}; `sloth-plugins list` shows all)"
            )
        patches = sorted({patch for name in architectures for patch in catalogue[name]})
        for pattern in term.patches:
            if not any(fnmatchcase(patch, pattern) for patch in patches):
                raise SlothError(
                    f"{selection.source}={selection.text!r}: no patch of {', '.join(architectures)} matches {pattern!r}"
                    f"{nearest(pattern, patches)} (known: {', '.join(patches)})"
                )

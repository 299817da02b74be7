"""The SLOTH_PLUGINS grammar: which patches of which architectures the user asks for.

    selection = "" | "0" | "off"                     nothing
              | term { "," term }                    left to right, the last match wins
    term      = "1" | "on"                           every patch that is on by default
              | [ "-" ] arch [ ":" patch { "+" patch } ]

`arch` and `patch` are names or globs (`*`, `?`). `llama` means Llama's default patches; a patch that is off by
default needs its name or a pattern other than a bare `*`. A selection that begins with an exclusion starts from all
defaults.
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
FORM = "ARCH[:PATCH[+PATCH...]], for example llama:rms_norm+rope"


@dataclass(frozen=True, slots=True)
class Term:
    """One term: architecture pattern, patch patterns (empty: the defaults), and whether it takes away."""

    text: str
    architecture: str
    patches: tuple[str, ...] = ()
    excludes: bool = False

    @property
    def architecture_is_name(self) -> bool:
        """Whether the architecture is written out, without a glob."""
        return not _is_glob(self.architecture)


@dataclass(frozen=True, slots=True)
class Selection:
    """A parsed selection; without terms it is off."""

    text: str
    terms: tuple[Term, ...] = ()

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


def _is_glob(pattern: str) -> bool:
    return "*" in pattern or "?" in pattern


def _malformed(text: str, part: str, why: str) -> SlothError:
    return SlothError(f"{VARIABLE}={text!r}: {part!r} {why}; a term is {FORM}, and 1 or off stand for all or nothing")


def _parse_term(text: str, part: str) -> Term:
    if part == "":
        raise SlothError(f"{VARIABLE}={text!r} has an empty term; a term is {FORM}")
    if part.lower() in ON:
        return Term(text=part, architecture="*")
    if part.lower() in OFF:
        raise _malformed(text, part, "cannot be combined with other terms")
    excludes = part.startswith("-")
    architecture, colon, patches = part.removeprefix("-").partition(":")
    if not PATTERN.fullmatch(architecture):
        raise _malformed(text, part, "has no architecture that can be read")
    names = tuple(patches.split("+")) if colon else ()
    for name in names:
        if not PATTERN.fullmatch(name):
            raise _malformed(text, part, f"has a patch {name!r} that cannot be read" if name else "has an empty patch")
    return Term(text=part, architecture=architecture, patches=names, excludes=excludes)


def parse(text: str | None) -> Selection:
    """Read a selection; raises `SlothError` with the offending term quoted."""
    if text is None or text.strip().lower() in OFF:
        return Selection(text or "")
    return Selection(text, tuple(_parse_term(text, part) for part in text.split(",")))


def decide(selection: Selection, architecture: str, patch: str, *, default: bool = True) -> Decision:
    """Whether `patch` of `architecture` is selected; `default` is what the patch declares."""
    if selection.is_off:
        return Decision(False)
    decision = Decision(selection.terms[0].excludes and default)
    for term in selection.terms:
        if not fnmatchcase(architecture, term.architecture):
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
    """Raise `SlothError` for a term that can match nothing in `catalogue` (architecture name to patch names)."""
    for term in selection.terms:
        architectures = [name for name in catalogue if fnmatchcase(name, term.architecture)]
        if not architectures:
            hint = nearest(term.architecture, [*catalogue, *ON])
            raise SlothError(
                f"{VARIABLE}={selection.text!r}: no architecture matches {term.architecture!r}{hint} "
                f"(known: {', '.join(catalogue) or 'none'}; `sloth-plugins list` shows all)"
            )
        patches = sorted({patch for name in architectures for patch in catalogue[name]})
        for pattern in term.patches:
            if not any(fnmatchcase(patch, pattern) for patch in patches):
                raise SlothError(
                    f"{VARIABLE}={selection.text!r}: no patch of {', '.join(architectures)} matches {pattern!r}"
                    f"{nearest(pattern, patches)} (known: {', '.join(patches)})"
                )

"""PEP 508 requirements that answer with what was required and what was found, not with a bool."""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

# The usual form, without extras, URLs or markers. It is told apart because packaging takes 20 ms to import, and specs
# are built while torch is imported, to check the names in SLOTH_PLUGINS.
_NUMBER = r"\d+(\.\d+)*((a|b|rc|\.post|\.dev)\d+)*"
_PLAIN = re.compile(rf"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?((==|!=|>=|<=|<|>){_NUMBER}(,(?!$)|$))*")


class Unmet(NamedTuple):
    """A requirement that does not hold: `found` is the installed version, or `"not installed"`."""

    required: str
    found: str


def malformed(text: str) -> str | None:
    """Why a string is no PEP 508 requirement, or None if it is one."""
    if _PLAIN.fullmatch(text):
        return None
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        Requirement(text)
    except InvalidRequirement as error:
        return str(error).splitlines()[0]
    return None


def first_unmet(requirements: Iterable[str], version_of: Callable[[str], str | None]) -> Unmet | None:
    """The first requirement that does not hold, or None.

    `version_of` maps a distribution's name to its installed version, or None. A requirement whose environment marker
    does not match this machine holds. Pre-releases count as their number says.
    """
    from packaging.requirements import Requirement

    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        found = version_of(requirement.name)
        if found is None:
            return Unmet(text, "not installed")
        if not requirement.specifier.contains(found, prereleases=True):
            return Unmet(text, found)
    return None

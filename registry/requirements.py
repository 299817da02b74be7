"""PEP 508 requirements that answer with what was required and what was found, not with a bool."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from packaging.requirements import Requirement


class Unmet(NamedTuple):
    """A requirement that does not hold: `found` is the installed version, or `"not installed"`."""

    required: str
    found: str


def first_unmet(requirements: Iterable[str], version_of: Callable[[str], str | None]) -> Unmet | None:
    """The first requirement that does not hold, or None.

    `version_of` maps a distribution's name to its installed version, or None. A requirement whose environment marker
    does not match this machine holds. Pre-releases count as their number says.
    """
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

"""compat/upstream.lock: the upstream code that the patches were tested with, by fingerprint.

`python compat/lock.py` prints the code of the installed transformers as JSON; `make lock` does that for every pin and
writes the file. A reviewer of a change to it reads the diff of upstream.
"""

import difflib
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.version import Version

LOCK = Path(__file__).resolve().parent / "upstream.lock"


def pieces(patch: Any, *, of_trainer: bool = False) -> Iterator[tuple[str, bool]]:
    """Paths of the upstream code that a patch depends on, and whether what it calls counts as well.

    Of a trainer that is what the patch names in `replaces`; one that does not exist here goes by its first path.
    """
    from sloth_plugins.resolving import replaced_code, target_path

    if not of_trainer:
        yield target_path(patch), True
    if patch.within is not None:
        yield patch.within, False
    for code in replaced_code(patch):
        yield (code.partition(" | ")[0], True) if isinstance(code, str) else (code.path, code.deep)


def code_of(path: str, deep: bool) -> dict[str, str] | None:
    """Fingerprint and normalised source of a piece of the installed upstream, or None."""
    from sloth_plugins.fingerprint import fingerprint, normalised
    from sloth_plugins.resolving import upstream_code

    code = upstream_code(path)
    if code is None:
        return None
    found = fingerprint(code.function, code.owner, deep=deep)
    source = normalised(code.function, code.owner, deep=deep)
    return None if found is None or source is None else {"fingerprint": found, "source": source}


def installed() -> dict[str, dict[str, str]]:
    """The code of every piece that a built-in patch depends on and that exists here."""
    from sloth_plugins.discovery import Plugins

    plugins = Plugins(load_entry_points=False)
    found: dict[str, dict[str, str] | None] = {}
    for spec in plugins.specs:
        for patch in plugins.patches(spec.name):
            wanted = pieces(patch, of_trainer=spec.name in plugins.trainers)
            found |= {path: code_of(path, deep) for path, deep in wanted}
    return {path: code for path, code in sorted(found.items()) if code is not None}


@functools.cache
def read() -> dict[str, Any]:
    """The lock: `objects` maps a path to fingerprints and the versions that have each, `sources` holds their code."""
    content: dict[str, Any] = json.loads(LOCK.read_text(encoding="utf-8")) if LOCK.exists() else {}
    return content or {"objects": {}, "sources": {}}


def write(by_version: dict[str, dict[str, dict[str, str]]]) -> None:
    """Write the lock from the installed code of each version."""
    objects: dict[str, dict[str, list[str]]] = {}
    sources: dict[str, list[str]] = {}
    for version, found in by_version.items():
        for path, code in found.items():
            objects.setdefault(path, {}).setdefault(code["fingerprint"], []).append(version)
            sources.setdefault(code["fingerprint"], code["source"].splitlines())
    # A line for each fingerprint, not one for each version of it: it is read in reviews.
    joined = {path: {found: " ".join(names) for found, names in known.items()} for path, known in objects.items()}
    content = {"objects": joined, "sources": sources}
    LOCK.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    read.cache_clear()


def changed_code(patch: Any, *, of_trainer: bool = False) -> str | None:
    """None if all upstream code of a patch is locked, else a diff to the newest that is."""
    diffs: list[str] = []
    for path, deep in pieces(patch, of_trainer=of_trainer):
        code, known = code_of(path, deep), read()["objects"].get(path, {})
        if code is not None and code["fingerprint"] in known:
            continue
        newest = max(known, key=lambda found: max(map(Version, known[found].split()))) if known else ""
        before = read()["sources"].get(newest, [])
        after = code["source"].splitlines() if code is not None else []
        if code is None and not before:
            diffs.append(f"{path} is neither here nor in the lock")
        diffs += difflib.unified_diff(before, after, f"{path} {newest}", f"{path} installed", lineterm="")
    return "\n".join(diffs) if diffs else None


if __name__ == "__main__":
    json.dump(installed(), sys.stdout)

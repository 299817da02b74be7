"""What the compat matrix found, as it is shipped: known upstream code, and a verdict for each tested version.

`compatibility.json` is written by compat/render.py from the results of the matrix.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def _data() -> dict[str, Any]:
    text = (files(__package__) / "compatibility.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def known_fingerprints(path: str) -> frozenset[str] | None:
    """Fingerprints of an upstream object ("package.module:name") that were tested; None where none is recorded."""
    found = _data()["fingerprints"].get(path)
    return None if found is None else frozenset(found)


def verdict(model_type: str, patch: str, version: str) -> str:
    """What the matrix says of a patch on a version of transformers; empty where it knows neither."""
    cells: dict[str, str] = _data()["cells"].get(model_type, {}).get(patch, {})
    if version in cells:
        return f"{cells[version]} on {version}"
    return f"{version} is not in the matrix" if cells else ""

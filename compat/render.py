"""Write what the matrix found to where it is read: the README's table and sloth_plugins/compatibility.json.

`python compat/render.py` writes them from results.json and upstream.lock; with `--check` it only says what is stale.
"""

import json
import sys
from collections import Counter
from typing import Any

import lock
from overlays import ROOT

RESULTS = ROOT / "compat" / "results.json"
README = ROOT / "README.md"
SHIPPED = ROOT / "sloth_plugins" / "compatibility.json"
BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"
SIGNS = {"experimental": "experimental", "unsupported": "without", "red": "BROKEN"}

Results = dict[str, Any]


def rows(results: Results) -> list[tuple[str, str, list[str]]]:
    """(model type, patch, state on each pin) of every cell."""
    names = {(kind, patch): None for pin in results.values() for kind, row in pin["cells"].items() for patch in row}

    def state(pin: Results, kind: str, patch: str) -> str:
        found: dict[str, str] = pin["cells"].get(kind, {}).get(patch, {"state": "absent"})
        return found["state"]

    return [(kind, patch, [state(pin, kind, patch) for pin in results.values()]) for kind, patch in names]


def counts(results: Results) -> Counter[str]:
    """How many cells there are of each state."""
    return Counter(state for _, _, states in rows(results) for state in states)


def summary(row: dict[str, Any]) -> str:
    """A model type on one pin: `yes` if all its patches are green, else the exceptions."""
    words = [f"{SIGNS[cell['state']]} {patch}" for patch, cell in row.items() if cell["state"] != "green"]
    return ", ".join(words) or "yes"


def table(results: Results) -> str:
    """The README's table: one row for each model type, one column for each pin."""
    heads = [
        f"latest ({pin['versions']['transformers']})" if name == "latest" else name for name, pin in results.items()
    ]
    lines = [f"| model type | patches | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    kinds: dict[str, list[str]] = {}
    for kind, patch, _ in rows(results):
        kinds.setdefault(kind, []).append(patch)
    for kind, patches in kinds.items():
        cells = " | ".join(summary(pin["cells"].get(kind, {})) for pin in results.values())
        lines.append(f"| `{kind}` | {', '.join(patches)} | {cells} |")
    found = counts(results)
    total = ", ".join(f"{number} {state}" for state, number in sorted(found.items(), key=lambda item: -item[1]))
    reasons = dict.fromkeys(
        f"{kind} {patch} {cell['reason'].partition(', found')[0]}"
        for pin in results.values()
        for kind, row in pin["cells"].items()
        for patch, cell in row.items()
        if cell["state"] != "green"
    )
    notes = [f"{len(rows(results)) * len(results)} cells: {total}."]
    notes += [f"Not green: {'; '.join(reasons)}."] if reasons else []
    return "\n".join([*lines, "", " ".join(notes)])


def readme(results: Results) -> str:
    """The README with the table between its marks."""
    text = README.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise SystemExit(f"README.md has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def shipped(results: Results) -> str:
    """The part of it that the runtime asks for: known fingerprints, and a verdict for each cell."""
    cells: dict[str, dict[str, dict[str, str]]] = {}
    for name, pin in results.items():
        if name == "latest":
            continue
        for kind, row in pin["cells"].items():
            for patch, cell in row.items():
                detail = f" ({cell['reason']})" if cell["state"] != "green" and cell["reason"] else ""
                cells.setdefault(kind, {}).setdefault(patch, {})[name] = cell["state"] + detail
    fingerprints = {path: sorted(found) for path, found in lock.read()["objects"].items()}
    return json.dumps({"cells": cells, "fingerprints": fingerprints}, indent=1, sort_keys=True) + "\n"


def main(arguments: list[str]) -> int:
    """Write, or check; 1 for what is stale."""
    results: Results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    stale = [
        (path, text)
        for path, text in ((README, readme(results)), (SHIPPED, shipped(results)))
        if path.read_text(encoding="utf-8") != text
    ]
    for path, text in stale:
        if "--check" in arguments:
            print(f"{path.relative_to(ROOT)} is not what compat/render.py writes; run it and commit the result")
        else:
            path.write_text(text, encoding="utf-8")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

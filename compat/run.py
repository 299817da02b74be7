"""Run the contract tests on the pins of matrix.toml: `python compat/run.py [PIN ...]`, all of them by default.

Each pin is a folder under build/compat that precedes site-packages, so torch and the rest are installed once. A
folder is reused for as long as its row of the matrix stays as it is.
"""

import difflib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OVERLAYS = ROOT / "build" / "compat"
TESTS = ("contract",)

Pin = dict[str, list[str] | str]


def pins() -> dict[str, Pin]:
    """The rows of matrix.toml by name."""
    matrix = tomllib.loads((ROOT / "compat" / "matrix.toml").read_text(encoding="utf-8"))
    return {row["name"]: row for row in matrix["pin"]}


def pip(target: Path, *arguments: str) -> None:
    """Install into a folder; pip's complaints about packages beside it do not concern it."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--progress-bar", "off"]
    done = subprocess.run([*command, "--target", str(target), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip install {' '.join(arguments)} failed:\n{done.stderr}")


def overlay(name: str, pin: Pin) -> Path:
    """The folder that holds a pin, made if it is not there; written beside and renamed."""
    folder, row = OVERLAYS / name, json.dumps(pin, sort_keys=True)
    if (folder / ".row").is_file() and (folder / ".row").read_text() == row:
        return folder
    fresh = OVERLAYS / f"{name}.part"
    shutil.rmtree(fresh, ignore_errors=True)
    pip(fresh, *pin["install"])
    if pin.get("without_dependencies"):
        pip(fresh, "--no-deps", *pin["without_dependencies"])
    (fresh / ".row").write_text(row)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    return folder


def run(name: str, pin: Pin) -> bool:
    """Install a pin, see that it is what is imported, and run the tests."""
    folder = overlay(name, pin)
    environment = dict(os.environ, PYTHONPATH=str(folder))
    probe = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    found = subprocess.run(probe, env=environment, capture_output=True, text=True).stdout.strip()
    if found != name:
        print(f"transformers {name}: the overlay holds {found or 'nothing that imports'}")
        return False
    print(f"transformers {name} ({pin['role']})", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *TESTS]
    return subprocess.run(command, cwd=ROOT / "tests", env=environment).returncode == 0


def main(wanted: list[str]) -> int:
    """Run the wanted pins, or all; 2 for one that is not in the matrix, 1 if one fails."""
    known = pins()
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            print(f"no pin {name!r} in compat/matrix.toml (known: {', '.join(known)}){hint}")
            return 2
    results = {name: run(name, known[name]) for name in wanted or known}
    print("  ".join(f"{name} {'passed' if ok else 'FAILED'}" for name, ok in results.items()))
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Run the contract on the lowest versions that pyproject.toml admits: `python compat/floor.py`.

The environment is built under build/floor from the `>=` bounds themselves, so a bound that is not tested cannot stand.
It holds torch with all that torch asks for, some gigabytes where only CUDA builds of that version exist; that is why
this is run when a bound changes and not with every test.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "floor"
TESTS = ("contract", "registry", "runtime/test_selection.py", "runtime/test_discovery.py", "runtime/test_cli.py")


def lowest(requirement: str) -> str:
    """`name>=1.2; marker` as `name==1.2; marker`."""
    pinned, count = re.subn(r">=\s*([\w.]+)", r"==\1", requirement, count=1)
    if not count:
        raise SystemExit(f"{requirement!r} in pyproject.toml has no lower bound")
    return pinned


def main() -> int:
    """Build the environment, then run the tests in it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = [lowest(requirement) for requirement in project["dependencies"]]
    print("\n".join(pins), flush=True)
    if not (FOLDER / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER], check=True)
    python = [str(FOLDER / "bin" / "python"), "-m"]
    subprocess.run([*python, "pip", "install", "-q", *pins, "pytest", "hypothesis"], check=True)
    subprocess.run([*python, "pip", "install", "-q", "--no-deps", "-e", str(ROOT)], check=True)
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    command = [*python, "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", *TESTS]
    return subprocess.run(command, cwd=ROOT / "tests", env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())

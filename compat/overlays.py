"""Folders that precede site-packages: one for each pin of matrix.toml, one with this project's own wheel.

torch and everything that a pin does not name is shared with the environment that runs this.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "compat"
# compatibility.json is made of upstream.lock, which counts, and of results, which must not.
PROGRAMS = ("cells", "lock", "skip_lists", "trainers", "verdicts")
SOURCES = ("sloth_plugins", "registry", "patches", "pyproject.toml", *(f"compat/{name}.py" for name in PROGRAMS))

Pin = dict[str, Any]


class OverlayError(Exception):
    """A pin that cannot be installed, with pip's own words."""


def pins() -> dict[str, Pin]:
    """The rows of matrix.toml by version of transformers."""
    matrix = tomllib.loads((ROOT / "compat" / "matrix.toml").read_text(encoding="utf-8"))
    return {row["transformers"]: row for row in matrix["pin"]}


def source_key() -> str:
    """A hash of all that decides a cell's result, beside the versions."""
    digest = hashlib.sha256()
    for name in (*SOURCES, "compat/upstream.lock"):
        path = ROOT / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts and file.name != "compatibility.json":
                digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _pip(*arguments: str) -> None:
    """Run pip; its complaints about packages beside a target folder do not concern it."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OverlayError(f"pip {' '.join(arguments)} failed:\n{done.stderr}")


def _made(folder: Path, key: str) -> bool:
    return (folder / ".key").is_file() and (folder / ".key").read_text() == key


def _put(fresh: Path, folder: Path, key: str) -> Path:
    """Rename a folder that is complete to where it is looked for."""
    (fresh / ".key").write_text(key)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    return folder


def overlay(name: str, pin: Pin) -> Path:
    """The folder that holds a pin, made if its row of the matrix has changed."""
    folder, key = BUILD / "pins" / name, json.dumps(pin, sort_keys=True)
    if _made(folder, key) and name != "latest":
        return folder
    fresh = BUILD / "pins" / f"{name}.part"
    shutil.rmtree(fresh, ignore_errors=True)
    version = "transformers" if name == "latest" else f"transformers=={name}"
    _pip("install", "--target", str(fresh), version, *pin.get("also", ()))
    _pip("install", "--target", str(fresh), "--no-deps", *pin["pairs"])
    return _put(fresh, folder, key)


def own_wheel(key: str) -> Path:
    """The folder that holds this project as its users install it: from a wheel."""
    folder = BUILD / "own"
    if _made(folder, key):
        return folder
    wheels, fresh = BUILD / "wheels", BUILD / "own.part"
    for stale in (wheels, fresh):
        shutil.rmtree(stale, ignore_errors=True)
    _pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT))
    (wheel,) = wheels.glob("*.whl")
    _pip("install", "--no-deps", "--target", str(fresh), str(wheel))
    return _put(fresh, folder, key)


def environment(pin: Path, own: Path) -> dict[str, str]:
    """Environment variables under which Python finds the pin and the wheel first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLOTH")}
    return kept | {
        "PYTHONPATH": os.pathsep.join((str(pin), str(own))),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def versions(variables: dict[str, str], own: Path) -> dict[str, str]:
    """What is really imported there. Raises `OverlayError` if it is not the wheel, or does not import."""
    program = (
        "import json, torch, transformers, peft, trl, accelerate, sloth_plugins; from trl import SFTTrainer; "
        "found = {m.__name__: m.__version__ for m in (torch, transformers, peft, trl, accelerate)}; "
        "print(json.dumps([sloth_plugins.__file__, found]))"
    )
    # -P: the folder that this is started in is not where packages are looked for.
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise OverlayError(f"the pin does not import:\n{done.stderr[-2000:]}")
    where, found = json.loads(done.stdout.strip().splitlines()[-1])
    if not Path(where).is_relative_to(own):
        raise OverlayError(f"{where} was imported, not the wheel")
    return {name: version.partition("+")[0] for name, version in found.items()}

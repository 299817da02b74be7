"""Look at the installation: versions, devices, conflicts, and every kernel against its reference."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from . import __version__
from .environment import REPORTED, RIVALS, installed_version, probe
from .planning import MINIMUM
from .report import columns
from .selection import VARIABLE

if TYPE_CHECKING:
    from rich.console import Console

SELF_CHECK = "sloth_plugins.patches.kernels.selfcheck"
SELF_CHECK_SECONDS = 300


def kernel_checks() -> list[dict[str, object]]:
    """Run every kernel, forward and backward, in a process of its own: compiled on a GPU, else interpreted.

    Each entry has `kernel`, `backend`, `error`, `limit` (relative, against the reference in the same dtype) and `ok`.
    A process that dies is one entry with the last line that it wrote.
    """
    import torch

    environment = dict(os.environ)
    environment.pop(VARIABLE, None)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", SELF_CHECK]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SELF_CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        return [{"kernel": "all", "ok": False, "message": f"no answer in {SELF_CHECK_SECONDS} s"}]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    checks: list[dict[str, object]] = [json.loads(line) for line in lines]
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        checks.append({"kernel": "all", "ok": False, "message": f"exit code {done.returncode}: {last}"})
    return checks


def _conflict_rows() -> list[tuple[str, str]]:
    found = [f"{name} is installed; it {when}" for name, module, when in RIVALS if find_spec(module) is not None]
    return [("conflict", f"{text}; what it has changed is left alone") for text in found] or [("conflicts", "none")]


def examine_installation(out: "Console") -> bool:
    """Print all that is known of the installation; True when every kernel agrees with its reference."""
    environment = probe()
    rows = [("sloth-plugins", __version__), ("python", f"{environment.python}, {environment.platform}")]
    rows += [(name, installed_version(name) or "not installed") for name in REPORTED]
    rows.append(("devices", ", ".join(environment.devices)))
    if environment.capability is not None:
        rows.append(("capability", "{}.{}".format(*environment.capability)))
    rows.append(("triton", environment.triton))
    rows.append(("needs", ", ".join(MINIMUM)))
    autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    if autoload == "0":
        rows.append(
            ("autoload", "off (TORCH_DEVICE_BACKEND_AUTOLOAD=0): use accelerate launch -m sloth_plugins train.py")
        )
    rows += _conflict_rows()
    out.print("\n".join(columns(rows)), markup=False)
    with out.status("running the kernels"):
        checks = kernel_checks()
    table = [("kernel", "backend", "error", "allowed", "")]
    for check in checks:
        if "message" in check:
            table.append((str(check["kernel"]), "", "", "", str(check["message"])))
        else:
            verdict = "ok" if check["ok"] else "WRONG"
            errors = (f"{check['error']:.1e}", f"{check['limit']:.1e}")
            table.append((str(check["kernel"]), str(check["backend"]), *errors, verdict))
    out.print("\n".join(columns(table)), markup=False)
    return bool(checks) and all(bool(check["ok"]) for check in checks)

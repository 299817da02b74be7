"""Run the compat matrix: `python compat/run.py [--ci] [--check] [--fresh] [--lock] [PIN ...]`, all pins by default.

Cells are run from this project's built wheel, in as many processes side by side as memory allows. What is done stays
under build/compat, so a run that was interrupted goes on where it stopped. Results go into results.json; with `--check`
that file stays as it is, and a cell whose verdict differs from it is an error.
"""

import argparse
import difflib
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Container
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lock
import overlays
from cells import cell_names, few_of, read_cells
from overlays import BUILD, ROOT, OverlayError, Pin
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

RESULTS = ROOT / "compat" / "results.json"
# Resident size of one process, measured 1.1 GiB, with room to spare.
GIB_PER_PROCESS = 2.5
# Processes that share the cells of a pin, so that none is left alone with the last one.
PARTS = 2

Result = dict[str, Any]
_children: list[subprocess.Popen[bytes]] = []
_stopping = threading.Event()


def workers() -> int:
    """How many processes run side by side: one for each core, and no more than fit."""
    import psutil

    return max(1, min(os.cpu_count() or 1, int(psutil.virtual_memory().available / 2**30 / GIB_PER_PROCESS)))


@functools.cache
def all_cells() -> list[tuple[str, str, str]]:
    """(architecture, model type, patch) of every cell that a pin has."""
    from sloth_plugins.discovery import Plugins

    return cell_names(Plugins(load_entry_points=False))


class Run:
    """The cells of one pin; its parts run in threads of their own."""

    def __init__(self, name: str, pin: Pin, own: Path, key: str, fresh: bool, few: bool, progress: Progress) -> None:
        self.name, self.pin, self.own, self.key, self.fresh, self.few = name, pin, own, key, fresh, few
        total = len(few_of(all_cells()) if few else all_cells())
        self.progress, self.task = progress, progress.add_task(name, total=total, visible=False)
        self._lock = threading.Lock()
        self._installed: tuple[dict[str, str], dict[str, str], Path] | None = None

    def install(self) -> tuple[dict[str, str], dict[str, str], Path]:
        """(the environment, versions in it, the file of its cells), made by whoever comes first."""
        with self._lock:
            if self._installed is None:
                self.progress.update(self.task, description=f"{self.name} installing", visible=True)
                variables = overlays.environment(overlays.overlay(self.name, self.pin), self.own)
                found = overlays.versions(variables, self.own)
                kind = ".few" if self.few else ""
                file = BUILD / "cells" / f"{self.name}-{self.key}-{found['transformers']}{kind}.jsonl"
                file.parent.mkdir(parents=True, exist_ok=True)
                if self.fresh:
                    file.unlink(missing_ok=True)
                self._installed = variables, found, file
        return self._installed

    def run_part(self, part: int) -> None:
        """Run some of the cells. Raises `OverlayError` if the pin cannot be installed, or if they break off."""
        variables, _, file = self.install()
        log = file.with_suffix(f".{part}.log")
        with log.open("wb") as output:
            command = [sys.executable, str(ROOT / "compat" / "cells.py"), str(file), str(part), str(PARTS)]
            command += ["few"] if self.few else []
            if _stopping.is_set():
                raise OverlayError("stopped")
            child = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)
            _children.append(child)
            while child.poll() is None:
                self.progress.update(self.task, completed=len(read_cells(file)), description=self.name)
                time.sleep(0.5)
        if child.returncode:
            raise OverlayError(f"the cells of {self.name} ended with {child.returncode}:\n{log.read_text()[-2000:]}")

    def result(self) -> Result:
        """What its cells have found, which is printed too."""
        _, found, file = self.install()
        # In the order of the patches, whoever came first.
        order = {names[1:]: i for i, names in enumerate(all_cells())}
        done = sorted(read_cells(file), key=lambda cell: order.get((cell["model_type"], cell["patch"]), len(order)))
        self.progress.update(self.task, completed=len(done), description=self.name)
        states = [cell["state"] for cell in done]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        self.progress.console.print(f"transformers {self.name} ({self.pin['role']}): {counts}", markup=False)
        for cell in done:
            if cell["state"] == "red":
                self.progress.console.print(f"  {cell['model_type']} {cell['patch']}: {cell['reason']}", markup=False)
                self.progress.console.print(cell["diff"], markup=False) if cell["diff"] else None
        table: dict[str, dict[str, dict[str, str]]] = {}
        for cell in done:
            table.setdefault(cell["model_type"], {})[cell["patch"]] = {"state": cell["state"], "reason": cell["reason"]}
        return {"role": self.pin["role"], "code": self.key, "versions": found, "cells": table}


def in_turn(runs: list[Run]) -> list[tuple[Run, int]]:
    """Parts of two pins by turns, so that while one is installed the other's run."""
    pairs = [runs[i : i + 2] for i in range(0, len(runs), 2)]
    return [(run, part) for pair in pairs for part in range(PARTS) for run in pair]


def run_pins(wanted: dict[str, Pin], fresh: bool, few: Container[str]) -> tuple[dict[str, Result], list[str]]:
    """Results by pin, and what could not be run; of the pins in `few`, few cells."""
    key = overlays.source_key()
    own = overlays.own_wheel(key)
    results: dict[str, Result] = {}
    faults: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, ThreadPoolExecutor(workers()) as pool:
        runs = [Run(name, pin, own, key, fresh, name in few, progress) for name, pin in wanted.items()]
        futures: dict[str, list[Future[None]]] = {}
        for run, part in in_turn(runs):
            futures.setdefault(run.name, []).append(pool.submit(run.run_part, part))
        try:
            for run in runs:
                try:
                    for future in futures[run.name]:
                        future.result()
                    results[run.name] = run.result()
                except OverlayError as error:
                    # That today's newest cannot be installed is news, and no defect of a change.
                    print(f"transformers {run.name}: {error}") if run.name == "latest" else faults.append(
                        f"transformers {run.name}: {error}"
                    )
        except KeyboardInterrupt:
            _stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for child in _children:
                child.terminate()
            raise
    return results, faults


def differences(found: dict[str, Result], recorded: dict[str, Result], few: Container[str] = ()) -> list[str]:
    """Cells whose state is not the recorded one, each in a line; of the pins in `few`, few were to be run."""
    lines = []
    left_out = {name[1:] for name in all_cells()} - {name[1:] for name in few_of(all_cells())}
    for pin, result in found.items():
        before = recorded.get(pin, {}).get("cells", {})
        for kind, row in result["cells"].items():
            for patch, cell in row.items():
                was = before.get(kind, {}).get(patch, {}).get("state", "absent")
                if was != cell["state"]:
                    lines.append(f"{pin} {kind} {patch}: {cell['state']}, recorded as {was}. {cell['reason']}".rstrip())
        for kind, row in before.items():
            gone = row.keys() - result["cells"].get(kind, {}).keys()
            missed = [patch for patch in sorted(gone) if pin not in few or (kind, patch) not in left_out]
            lines += [f"{pin} {kind} {patch}: recorded, but no such cell was run" for patch in missed]
    return lines


def write_lock(wanted: dict[str, Pin]) -> None:
    """Write upstream.lock from the code of the pins."""
    own = overlays.own_wheel(overlays.source_key())
    by_version: dict[str, Any] = {}
    for name, pin in wanted.items():
        variables = overlays.environment(overlays.overlay(name, pin), own)
        command = [sys.executable, str(ROOT / "compat" / "lock.py")]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        if done.returncode:
            raise OverlayError(f"reading the code of {name} failed:\n{done.stderr[-2000:]}")
        by_version[name] = json.loads(done.stdout)
        print(f"transformers {name}: {len(by_version[name])} pieces of upstream code", flush=True)
    lock.write(by_version)


def choose(arguments: argparse.Namespace) -> dict[str, Pin]:
    """The pins that are asked for. Exits with 2 for one that is not in the matrix."""
    known = overlays.pins()
    for name in arguments.pins:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            print(f"no pin {name!r} in compat/matrix.toml (known: {', '.join(known)}){hint}")
            raise SystemExit(2)
    if arguments.ci:
        return {name: pin for name, pin in known.items() if pin.get("ci")}
    if arguments.lock:
        return {name: pin for name, pin in known.items() if name != "latest"}
    return {name: known[name] for name in arguments.pins or known}


def main() -> int:
    """0 if every cell is what it must be, 1 if one is not, 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(description="Run the compat matrix.")
    parser.add_argument("pins", nargs="*", metavar="PIN", help="versions of transformers in compat/matrix.toml")
    parser.add_argument("--ci", action="store_true", help="what every change must pass, as compat/matrix.toml says")
    parser.add_argument("--check", action="store_true", help="compare with results.json instead of writing it")
    parser.add_argument("--fresh", action="store_true", help="run cells again that are already done")
    parser.add_argument("--lock", action="store_true", help="write upstream.lock from the pins, and run nothing")
    arguments = parser.parse_args()
    if arguments.lock and (arguments.ci or arguments.check or arguments.pins):
        parser.error("--lock reads all pins and runs nothing; it takes no other option")
    if arguments.ci and arguments.pins:
        parser.error("--ci names its pins itself")
    if arguments.ci and not arguments.check:
        parser.error("--ci runs part of some pins, which is no record: it goes with --check")
    wanted = choose(arguments)
    few = {name for name, pin in wanted.items() if arguments.ci and pin["ci"] == "together"}
    try:
        if arguments.lock:
            write_lock(wanted)
            return 0
        results, faults = run_pins(wanted, arguments.fresh, few)
    except OverlayError as error:
        print(error)
        return 1
    except KeyboardInterrupt:
        print("stopped; what is done is kept, and the same command goes on from here")
        return 130
    recorded: dict[str, Result] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if arguments.check:
        faults += differences(results, recorded, few)
    else:
        order = [name for name in overlays.pins() if name in {**recorded, **results}]
        merged = {name: {**recorded, **results}[name] for name in order}
        RESULTS.write_text(json.dumps(merged, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    red = [
        f"{pin} {kind} {patch} is red"
        for pin, result in results.items()
        if pin != "latest"
        for kind, row in result["cells"].items()
        for patch, cell in row.items()
        if cell["state"] == "red"
    ]
    for fault in (*faults, *red):
        print(fault)
    return 1 if faults or red else 0


if __name__ == "__main__":
    sys.exit(main())

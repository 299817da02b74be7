"""Child processes of the demo: output to a log, progress to a callback, and none outlives its parent."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

STEP = re.compile(r"^step (\d+)/(\d+)", re.MULTILINE)
POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0
TAIL_BYTES = 64_000


class ChildFailed(Exception):
    """A child ended with a non-zero exit status."""

    def __init__(self, name: str, status: int, log: Path) -> None:
        super().__init__(f"{name} failed with exit status {status}; its whole output is in {log}")
        self.log = log


def run_child(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    progress: Callable[[float], None] = lambda fraction: None,
) -> float:
    """Run `command` to its end with stdout and stderr in `log`; returns the seconds it took.

    `progress` is called with the fraction done, read from the `step k/n` lines that the child prints. Raises
    `ChildFailed` on a non-zero exit status. Whatever interrupts the wait (Ctrl-C), the child's process group is ended.
    """
    began = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,  # a process group of its own, which can be ended whole
        )
        try:
            while process.poll() is None:
                progress(fraction_done(log))
                time.sleep(POLL_SECONDS)
        finally:
            end(process)
    if process.returncode:
        raise ChildFailed(name, process.returncode, log)
    progress(1.0)
    return time.perf_counter() - began


def end(process: subprocess.Popen[bytes]) -> None:
    """End a child's whole process group if the child still runs: politely first, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def fraction_done(log: Path) -> float:
    """The fraction that the last `step k/n` line of a log states, 0 before the first."""
    steps = STEP.findall(tail_text(log))
    return int(steps[-1][0]) / int(steps[-1][1]) if steps else 0.0


def last_lines(log: Path, count: int = 20) -> str:
    """The last lines of a log."""
    return "\n".join(tail_text(log).splitlines()[-count:])


def tail_text(log: Path) -> str:
    """The end of a log as text; logs grow, and only their end is of interest."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")

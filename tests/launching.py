"""Start the scripts under tests/scripts as a user would, and read what they leave."""

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from paths import ROOT, SCRIPTS

ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
]
# Through nothing, in a fork.
WARM: list[str] = []
# `--cpu` runs one process whatever --num_processes says; several need the multi-GPU launcher and this variable.
SEVERAL = {"ACCELERATE_USE_CPU": "true"}


def environment(flag=None, **changes):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLOTH", "ACCELERATE_", "TRITON_INTERPRET"))}
    kept |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SCRIPTS), kept.get("PYTHONPATH", "")]))
    if flag is not None:
        kept["SLOTH_PLUGINS"] = flag
    return kept | changes


def run(command, folder, flag=None, timeout=240, **changes):
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment(flag, **changes),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def python(code, folder, flag=None, **changes):
    return run([sys.executable, "-c", code], folder, flag, **changes)


@functools.cache
def _warm():
    """The process that forks, and a folder for what its children write; it ends with this one."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    options = {"HF_DATASETS_CACHE": str(folder / "datasets")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "warm.py"], env=environment(**options), text=True, **pipes
    )
    assert process.stdout.readline() == "ready\n"
    return process, folder


def free_port():
    """A port of this host that nobody has now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _rank(rank, processes, port):
    """What a launcher says to one of several processes."""
    if processes == 1:
        return {}
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    said |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in said.items()}


def warm(command, folder, flag=None, timeout=240, processes=1, **changes):
    """As `run`, of what comes after `python`, in processes that have imported torch, Trainer and the like already."""
    (process, place), port = _warm(), free_port()
    said = {stream: place / stream for stream in ("stdout", "stderr")}
    for file in said.values():
        file.write_text("")
    given = {"command": list(map(str, command)), "folder": str(folder), "timeout": timeout}
    given |= {stream: str(file) for stream, file in said.items()}
    given["environments"] = [environment(flag, **_rank(rank, processes, port), **changes) for rank in range(processes)]
    process.stdin.write(json.dumps(given) + "\n")
    process.stdin.flush()
    code = int(process.stdout.readline())
    return subprocess.CompletedProcess(command, code, *(file.read_text(errors="replace") for file in said.values()))


def launch(script, folder, flag=None, processes=1, arguments=(), through=ACCELERATE, **changes):
    """Run a training script; returns its losses and what it wrote to stderr and stdout. `through=WARM` forks for it."""
    losses = folder / "losses.json"
    prefix = list(through)
    if through is ACCELERATE:
        prefix += ["--num_processes", processes, "--multi_gpu" if processes > 1 else "--cpu"]
    changes |= SEVERAL if processes > 1 else {}
    command = [*prefix, SCRIPTS / script, "--losses", losses, "--out", folder / "out", *arguments]
    if through is WARM:
        done = warm(command, folder, flag, processes=processes, **changes)
    else:
        done = run(command, folder, flag, **changes)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(losses.read_text()), done.stderr + done.stdout

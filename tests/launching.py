"""Start the scripts under tests/scripts as a user would, and read what they leave."""

import json
import os
import subprocess
import sys

from paths import SCRIPTS

ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
]
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


def launch(script, folder, flag=None, processes=1, arguments=(), through=ACCELERATE, **changes):
    """Run a training script; returns its losses and what it wrote to stderr and stdout."""
    losses = folder / "losses.json"
    prefix = list(through)
    if through is ACCELERATE:
        prefix += ["--num_processes", processes, "--multi_gpu" if processes > 1 else "--cpu"]
        changes |= SEVERAL if processes > 1 else {}
    command = [*prefix, SCRIPTS / script, "--losses", losses, "--out", folder / "out", *arguments]
    done = run(command, folder, flag, **changes)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(losses.read_text()), done.stderr + done.stdout

"""Engines on a real vLLM, which `make vllm` installs; without it these tests are skipped."""

import json
import os
import subprocess
import sys
from unittest import mock

import pytest
from install_vllm import FOLDER, PYTHON, is_installed
from launching import free_port
from paths import ROOT

HERE = ROOT / "tests" / "rollouts"
sys.path.insert(0, str(ROOT / "compat"))


@pytest.fixture(autouse=True)
def _no_ranks_are_left():
    """TRL says in the environment that this process is one of several, which scripts of later tests would believe."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def vllm_python():
    if not is_installed():
        reason = f"no vLLM in {FOLDER}: `make vllm` installs it"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return PYTHON


@pytest.fixture(scope="session")
def engine(vllm_python, tmp_path_factory):
    """Run a scenario of scenarios.py in a process of its own; returns what it returns, and its log."""
    folder = tmp_path_factory.mktemp("engines")
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("SLOTH", "VLLM", "TRITON_INTERPRET"))
    }
    log = folder / "log"
    # Of ports TRL would take the one that accelerate takes too, in tests that run beside these.
    parent = subprocess.Popen(
        [vllm_python, HERE / "engines.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
        env={**kept, "CUDA_VISIBLE_DEVICES": "", "MASTER_PORT": str(free_port())},
    )

    def answer():
        line = parent.stdout.readline()
        assert line, log.read_text()[-3000:]
        return line

    while answer() != "ready\n":
        pass
    done = {}

    def run(scenario, **arguments):
        key = json.dumps([scenario, arguments], sort_keys=True)
        if key not in done:
            place = folder / str(len(done))
            place.mkdir()
            result = place / "result.json"
            parent.stdin.write(json.dumps([scenario, arguments, str(result)]) + "\n")
            parent.stdin.flush()
            while answer() != "done\n":
                pass
            said = result.with_suffix(".log").read_text(errors="replace")
            made = json.loads(result.read_text()) if result.exists() else {"raised": "the process ended"}
            done[key] = made, said
        made, said = done[key]
        assert "raised" not in made, f"{made['raised']}\n{said[-3000:]}"
        return made["returned"], said

    yield run
    parent.stdin.close()
    parent.wait(30)

"""Several processes plan with the memory of the one that has least."""

import os
import re
import sys

from launching import run
from paths import ROOT, SCRIPTS


def test_two_processes_with_unequal_memory_plan_alike(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631"]
    path = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "tests/blocks", "tests/checkpointing"))
    done = run([*torchrun, SCRIPTS / "planned_ranks.py"], tmp_path, PYTHONPATH=path, OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    plans = re.findall(r"plan (\[.*?\]) ceiling (\d+)", done.stdout)
    assert len(plans) == 2, done.stdout
    assert plans[0] == plans[1]
    assert 0 < plans[0][0].count("'keep'") < 6

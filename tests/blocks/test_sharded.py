"""Fused blocks in two processes, replicated and sharded."""

import os
import sys

from launching import run
from paths import ROOT, SCRIPTS


def test_gradients_under_ddp_and_fsdp2_are_stocks(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"]
    path = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "tests/blocks"))
    done = run([*torchrun, SCRIPTS / "sharded_blocks.py"], tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-2000:]
    for sharding in ("ddp", "fsdp"):
        for checkpointing in (False, True):
            assert done.stdout.count(f"{sharding} {checkpointing} 2 near") == 2, done.stdout

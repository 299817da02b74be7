"""Fused blocks in two processes, replicated and sharded."""

import os

from launching import warm
from paths import ROOT, SCRIPTS


def test_gradients_under_ddp_and_fsdp2_are_stocks(tmp_path):
    path = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "tests/blocks"))
    done = warm([SCRIPTS / "sharded_blocks.py"], tmp_path, processes=2, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-2000:]
    for sharding in ("ddp", "fsdp"):
        for checkpointing in (False, True):
            assert done.stdout.count(f"{sharding} {checkpointing} 2 near") == 2, done.stdout

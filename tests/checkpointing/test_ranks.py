"""Several processes plan with the memory of the one that has least."""

import os
import re

from launching import warm
from paths import ROOT, SCRIPTS


def test_two_processes_plan_with_the_memory_of_the_smaller(tmp_path):
    path = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "tests/blocks", "tests/checkpointing"))
    done = warm([SCRIPTS / "planned_ranks.py"], tmp_path, processes=2, PYTHONPATH=path, OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"plan (\[.*?\]) ceiling (\d+)", done.stdout)
    assert len(found) == 2, done.stdout
    (first, least), (second, ceiling) = found
    assert least == ceiling
    # Seconds are each process's own, and with them which layers compute what again.
    assert all(plan.count("'keep'") < 6 for plan in (first, second))

"""What this package adds to `import torch`: loading and calling its entry point, in CPU time, in fresh processes.

Machines differ, so the unit is what it takes to compile a module of the standard library.
"""

import pytest
from launching import python

pytestmark = pytest.mark.slow
STARTS = 2
PROBE = """
import importlib.metadata, time
load = importlib.metadata.EntryPoint.load
def timed(entry):
    if entry.group != "torch.backends" or entry.name != "sloth_plugins":
        return load(entry)
    start = time.process_time()
    function = load(entry)
    def call():
        function()
        print("SECONDS", time.process_time() - start)
    return call
importlib.metadata.EntryPoint.load = timed
import torch
import dataclasses
from pathlib import Path
source = Path(dataclasses.__file__).read_text()
units = []
for _ in range(5):
    start = time.process_time()
    compile(source, "dataclasses", "exec")
    units.append(time.process_time() - start)
print("UNIT", min(units))
"""


def units(folder, flag):
    done = python(PROBE, folder, flag=flag)
    found = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("SECONDS", "UNIT")))
    return float(found["SECONDS"]) / float(found["UNIT"])


def test_import_torch_costs_next_to_nothing_more(tmp_path):
    # On a fast machine a unit is 5 ms.
    flags = {None: 0.5, "1": 5.0, "llama:rms_norm+rope": 11.0}
    found = {flag: [] for flag in flags}
    for _ in range(STARTS):
        for flag in flags:
            found[flag].append(units(tmp_path, flag))
    least = {flag: min(times) for flag, times in found.items()}
    print({str(flag): f"{value:.2f} units" for flag, value in least.items()})
    assert {flag: value < flags[flag] for flag, value in least.items()} == dict.fromkeys(flags, True), least

"""What this package adds to `import torch`: loading and calling its entry point, in CPU time, in fresh processes."""

import pytest
from launching import python

pytestmark = pytest.mark.slow
STARTS = 5
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
"""


def seconds(folder, flag):
    done = python(PROBE, folder, flag=flag)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SECONDS")]
    return float(line.split()[1])


def test_import_torch_costs_next_to_nothing_more(tmp_path):
    flags = {None: 0.002, "1": 0.030, "llama:rms_norm+rope": 0.045}
    found = {flag: [] for flag in flags}
    for _ in range(STARTS):
        for flag in flags:
            found[flag].append(seconds(tmp_path, flag))
    least = {flag: min(times) for flag, times in found.items()}
    print({str(flag): f"{1000 * value:.2f} ms" for flag, value in least.items()})
    assert {flag: value < flags[flag] for flag, value in least.items()} == dict.fromkeys(flags, True), least

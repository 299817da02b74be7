"""Fixtures of the kernel tests.

Triton decides when it is imported whether kernels are interpreted, and the other folders' tests in this process must
meet the reference. So these tests run twice: here on the reference, and in a child process that test_interpreter.py
starts with TRITON_INTERPRET=1, where the same files meet the Triton kernels. That takes a thousand times as long, so
each test there runs a few of its cases, the same ones every time; with SLOTH_ALL_CASES=1 it runs them all.
"""

import os
import random
from collections import defaultdict

import pytest
import torch

# Cases of each test for the interpreter.
CASES = 2


def pytest_collection_modifyitems(config, items):
    """Leave out what the interpreter need not run: tests that it says nothing of, and cases beyond those drawn."""
    if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("SLOTH_ALL_CASES") == "1":
        return
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("not_interpreted") is None:
            cases[item.nodeid.partition("[")[0]].append(item)
    # Drawn rather than every n-th, which would give all of them one value of a parameter.
    drawn = {id(item) for name, of in cases.items() for item in random.Random(name).sample(of, min(CASES, len(of)))}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in drawn])
    items[:] = [item for item in items if id(item) in drawn]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def _poisoned(monkeypatch):
    """Fresh memory is full of NaN, so a kernel that leaves part of its output unwritten cannot pass."""

    def poison(allocate):
        def allocated(*args, **kwargs):
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        return allocated

    # Torch lists what makes tensors when a device is first entered; it must not list these.
    with torch.device("cpu"):
        torch.empty(0)
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))

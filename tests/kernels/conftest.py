"""Fixtures of the kernel tests.

Triton decides when it is imported whether kernels are interpreted, and the other folders' tests in this process must
meet the reference. So these tests run twice: here on the reference, and in a child process that test_interpreter.py
starts with TRITON_INTERPRET=1, where the same files meet the Triton kernels. That takes a thousand times as long. Each
test runs some of its cases, the same ones every time, and fewer there; with SLOTH_ALL_CASES=1 it runs them all.
"""

import os
import random
from collections import defaultdict
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Cases of each test.
CASES = 6 if INTERPRETED else 24


def pytest_collection_modifyitems(config, items):
    """Leave out cases of this folder's tests beyond those drawn, and what the interpreter says nothing of."""
    if os.environ.get("SLOTH_ALL_CASES") == "1":
        return
    cases, drawn = defaultdict(list), set()
    for item in items:
        if HERE not in item.path.parents:
            drawn.add(id(item))
        elif not (INTERPRETED and item.get_closest_marker("not_interpreted")):
            cases[item.nodeid.partition("[")[0]].append(item)
    for name, of in cases.items():
        # Drawn rather than every n-th, which would give all of them one value of a parameter.
        drawn |= {id(item) for item in random.Random(name).sample(of, min(CASES, len(of)))}
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

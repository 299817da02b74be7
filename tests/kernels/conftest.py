"""Fixtures of the kernel tests.

Triton decides when it is imported whether kernels are interpreted, and the other folders' tests in this process must
meet the reference. So these tests run twice: here on the reference, and in a child process that test_interpreter.py
starts with TRITON_INTERPRET=1, where the same files meet the Triton kernels.
"""

import pytest
import torch


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

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))

"""The allocator is told to let its segments grow, and told otherwise afterwards."""

import sys

import pytest
import torch

from sloth_plugins.patches.checkpointing.segments import growing_segments


@pytest.fixture
def told(monkeypatch):
    """What a stand-in for the allocator of a GPU was told, the first thing before anything else."""
    said = [""]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: said[-1], raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append, raising=False)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    return said


def test_what_the_user_has_set_is_kept(told):
    told[:] = ["max_split_size_mb:64"]
    with growing_segments():
        assert told[1:] == ["max_split_size_mb:64,expandable_segments:True"]
    assert told[2:] == ["max_split_size_mb:64,expandable_segments:False"]


def test_nothing_is_told_where_the_user_has_decided(told):
    told[:] = ["expandable_segments:False"]
    with growing_segments():
        assert told == ["expandable_segments:False"]


@pytest.mark.parametrize("case", ["vllm", "another allocator", "no GPU"])
def test_nothing_is_told_where_it_cannot_be(told, monkeypatch, case):
    if case == "vllm":
        monkeypatch.setitem(sys.modules, "vllm", sys)
    elif case == "no GPU":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    else:
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    with growing_segments():
        assert told == [""]

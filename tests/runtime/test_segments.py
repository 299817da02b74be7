"""The allocator is told to let its segments grow while patches are active, and told otherwise afterwards."""

import os
import sys
import types

import pytest
import torch

from sloth_plugins import activation, segments


@pytest.fixture
def told(monkeypatch):
    """What a stand-in for the allocator of a GPU was told; first what it was told before."""
    said = [""]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: said[-1], raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append, raising=False)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr(segments, "_before", None)
    monkeypatch.setattr(segments, "_told", None)
    for name in segments.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return said


@pytest.fixture
def active():
    yield activation.activate
    activation.deactivate()


def test_while_plans_are_active(told, active):
    active("1")
    active("1,-llama")
    assert told == ["", "expandable_segments:True"]
    active("1,-trainer:memory_plans")
    active("1")
    activation.deactivate()
    activation.deactivate()
    assert told[2:] == [f"expandable_segments:{state}" for state in (False, True, False)]


@pytest.mark.parametrize("flag", ["0", "llama", "-trainer", "1,-*:memory_plans"])
def test_not_where_plans_are_off(told, active, flag):
    active(flag)
    assert told == [""]


def test_vllm_has_pools_of_its_own(told, active, monkeypatch, tmp_path):
    active("trainer:memory_plans")
    (tmp_path / "vllm.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    import vllm  # noqa: F401 - the import is what is tested

    assert told == ["", "expandable_segments:True", "expandable_segments:False"]


@pytest.mark.parametrize("settings", ["expandable_segments:False", "backend:cudaMallocAsync"])
@pytest.mark.parametrize("where", ["environment", "allocator"])
def test_what_the_user_has_decided_stays(told, settings, where, monkeypatch):
    if where == "environment":
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", settings)
    else:
        told[:] = [settings]
    segments.grow()
    assert len(told) == 1


def test_other_settings_of_the_users_are_kept(told, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    segments.grow()
    segments.stay()
    assert told[1:] == [f"max_split_size_mb:64,expandable_segments:{state}" for state in (True, False)]


@pytest.mark.parametrize("case", ["vllm", "no CUDA", "Windows"])
def test_where_it_cannot_be(told, monkeypatch, case):
    if case == "vllm":
        monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    elif case == "no CUDA":
        monkeypatch.setattr(torch.version, "cuda", None)
    else:
        monkeypatch.setattr(segments.platform, "release", lambda: "5.15.90.1-microsoft-standard-WSL2")
    segments.grow()
    assert told == [""]


def test_a_torch_that_cannot_be_asked(told, monkeypatch):
    said = []
    monkeypatch.delattr(torch._C, "_accelerator_getAllocatorSettings")
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings")
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", said.append)
    segments.grow()
    assert said == ["expandable_segments:True"]
    assert not any(name in os.environ for name in segments.VARIABLES)

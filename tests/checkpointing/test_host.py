"""Tensors in host memory: they come back as they were, in time, once, and their memory is used again."""

import gc

import pytest
import torch
from counted import Counted
from lora_models import batch, distance, fuse, gradients, lora_model

from sloth_plugins import patch
from sloth_plugins.patches.blocks.policy import Policy, choosing
from sloth_plugins.patches.checkpointing import backbone
from sloth_plugins.patches.checkpointing.budget import Budget
from sloth_plugins.patches.checkpointing.host import Host, Parked
from sloth_plugins.patches.checkpointing.layers import Shape
from sloth_plugins.patches.checkpointing.options import peak
from sloth_plugins.patches.checkpointing.solver import tightest

DIRECT = {"num_key_value_heads": 4, "head_dim": 16}


@pytest.fixture
def host():
    return Host(torch.device("cpu"), 2**20)


def test_tensors_come_back_as_they_were(host):
    given = [torch.randn(3, 5), torch.randn(2, 4, 6).transpose(0, 1), torch.arange(7), torch.randn(4).bfloat16()]
    copies = [t.clone() for t in given]
    parked = host.park(given)
    for t in given:
        t.zero_()
    for found, copy in zip(parked.take(keep=False), copies, strict=True):
        assert torch.equal(found, copy)
        assert found.dtype is copy.dtype


def test_a_second_taking_needs_keep(host):
    parked = host.park([torch.ones(3)])
    assert parked.take(keep=True)[0].sum() == 3
    assert parked.take(keep=False)[0].sum() == 3
    with pytest.raises(RuntimeError, match="a second time"):
        parked.take(keep=False)


def test_memory_is_used_again(host):
    for _ in range(3):
        parked = [host.park([torch.randn(8)]) for _ in range(4)]
        while parked:
            parked.pop().take(keep=False)
    assert host.buffers.bytes == 4 * 8 * 4
    dropped = [host.park([torch.randn(8)]) for _ in range(4)]
    del dropped
    gc.collect()
    host.park([torch.randn(8)])
    assert host.buffers.bytes == 4 * 8 * 4


def test_the_one_before_is_fetched_meanwhile(host, monkeypatch):
    parked = [host.park([torch.full((2,), float(i))]) for i in range(4)]
    order = []
    fetch = Parked.fetch
    monkeypatch.setattr(Parked, "fetch", lambda self: (order.append(parked.index(self)), fetch(self))[1])
    for i in (3, 2, 1, 0):
        assert parked[i].take(keep=False)[0][0] == i
        assert i == 0 or parked[i - 1].is_fetched
    assert order == [3, 2, 2, 1, 1, 0, 0]


def parking(host, policy):
    """A chooser that parks what it can of all layers."""

    def choose(layer, x, run):
        run.host = host
        return policy

    return choose


@pytest.mark.parametrize("policy", [Policy.INPUT, Policy.ATTENTION])
@pytest.mark.parametrize("kind", ["llama", "phi", "gemma3_text"])
def test_gradients_are_those_of_keep(policy, kind, host, runs):
    family = {"gemma3_text": "gemma3"}.get(kind, kind)
    model = lora_model(family, kind, changes=DIRECT if kind == "llama" else None)
    fuse(model)
    expected = gradients(model)
    with choosing(parking(host, policy)):
        loss, found = gradients(model)
    assert host.buffers.bytes > 0
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(found[name], expected[1][name]) for name in found)
    assert [run.policy for run in runs[2:]] == [policy] * 2
    assert all(run.parked is None and run.x is None and not run.kept for run in runs)


@pytest.mark.parametrize("policy", [Policy.INPUT, Policy.ATTENTION])
def test_a_graph_that_is_kept_runs_twice(policy, host):
    model = lora_model(changes=DIRECT)
    fuse(model)
    ids = batch()
    expected = gradients(model, ids)[1]
    with choosing(parking(host, policy)):
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert distance(found, expected) < 1e-6
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_many_lengths_stay_within_the_budget(host):
    for size in range(1, 4000, 37):
        host.park([torch.zeros(size)]).take(keep=False)
    small = Host(torch.device("cpu"), 2**12)
    for size in range(1, 4000, 37):
        small.park([torch.zeros(size, dtype=torch.uint8)]).take(keep=False)
    assert small.buffers.bytes <= 2**12


PARTS = {
    "all": {},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "late layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [3, 4, 5]},
}


@pytest.mark.parametrize("config", PARTS.values(), ids=PARTS)
def test_plans_use_the_host_where_the_device_is_too_small(config, monkeypatch):
    """Blocks and layers without adapters among them."""
    memory = Counted()
    monkeypatch.setattr(backbone, "memory_of", lambda device: memory)
    monkeypatch.setattr(backbone, "_stacks", type(backbone._stacks)())
    model = lora_model(changes={**DIRECT, "num_hidden_layers": 6}, **config)
    model.enable_input_require_grads()
    patch(model, "*:blocks,*:checkpointing")
    expected = [gradients(model) for _ in range(3)][-1]
    (stack,) = backbone._stacks.values()
    stack.host_budget = 2**30
    stack.budget = Budget("min")
    loss, found = gradients(model)
    assert [option.on_host for option in stack.current.options] == [True] * 5 + [False]
    assert stack.current.share == pytest.approx(1.0)
    assert stack.host.buffers.bytes <= sum(option.host for option in stack.current.options)
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(found[name], expected[1][name]) for name in found)


@pytest.mark.parametrize("share", [1.02, 0.98])
def test_what_is_too_large_for_the_device_is_measured_with_the_host(share, monkeypatch):
    """Rather than after it has run out of memory."""
    memory = Counted()
    monkeypatch.setattr(backbone, "memory_of", lambda device: memory)
    monkeypatch.setattr(backbone, "_stacks", type(backbone._stacks)())
    model = lora_model(changes={**DIRECT, "num_hidden_layers": 6})
    model.enable_input_require_grads()
    patch(model, "*:blocks,*:checkpointing")
    with memory.counting:
        for _ in range(2):
            gradients(model, batch(1, 20))
        (stack,) = backbone._stacks.values()
        stack.host_budget = 2**30
        model.zero_grad()
        births, others = stack._unborn()
        options, after = stack._expected(Shape(320, 6400))
        memory.size = memory.allocated() + others + int(share * peak(tightest(options), after, births))
        gradients(model, batch(16, 20))
    assert stack.current is None
    assert (stack.host is not None) is (share < 1.0)

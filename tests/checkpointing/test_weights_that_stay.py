"""Weights made from four bits that stay while there is memory: the same numbers, and gone when they are in the way."""

import pytest
import torch
from counted import Counted
from lora_models import batch, gradients
from peft import LoraConfig, get_peft_model
from test_quantised import quantised

from sloth_plugins import patch
from sloth_plugins.patches.blocks import graphs, made_weight, resident
from sloth_plugins.patches.checkpointing import backbone, weights
from sloth_plugins.patches.checkpointing.budget import Budget

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=[4, 8], ids=["alone", "with room"])
def made(monkeypatch, request):
    """A four-bit model with plans, and the weights that are made from four bits; with room for adapters or without."""
    memory = Counted()
    monkeypatch.setattr(backbone, "memory_of", lambda device: memory)
    monkeypatch.setattr(backbone, "_stacks", type(backbone._stacks)())
    monkeypatch.setattr(graphs, "MAX_WORK", 0)
    made = []
    for name in ("dequantize_four_bit", "dequantize_four_bit_rows"):
        original = getattr(made_weight, name)
        monkeypatch.setattr(made_weight, name, lambda *args, original=original: (made.append(1), original(*args))[1])
    model, _ = quantised()
    torch.manual_seed(0)
    model = get_peft_model(
        model, LoraConfig(r=request.param, target_modules="all-linear", init_lora_weights=False)
    ).train()
    patch(model, "*:blocks,*:checkpointing")
    with torch.compiler.set_stance("force_eager"):
        expected = gradients(model)
        gradients(model)
        del made[:]
        yield model, made, expected


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


def test_each_is_made_once(made):
    model, calls, expected = made
    assert_same(gradients(model), expected)
    assert len(calls) in (0, 8)
    del calls[:]
    for _ in range(3):
        assert_same(gradients(model), expected)
    assert not calls
    (stack,) = backbone._stacks.values()
    assert stack.staying > 0
    groups = [group for parts in stack._fused() for group in parts.groups]
    held = [p for group in groups for p in group.projections]
    assert stack.staying == resident.size(held) == sum(4 * (g.n + g.room) * g.k for g in groups)
    assert all((g.room == g.r) == (g.r % 8 == 0) for g in groups)


def test_they_go_where_memory_is_short(made):
    model, calls, expected = made
    gradients(model)
    (stack,) = backbone._stacks.values()
    full = stack.staying
    # Once they are gone, there is room for as much as they took.
    stack.memory.size = stack.memory.allocated() + stack.current.peak
    assert_same(gradients(model), expected)
    assert 0 < stack.staying <= weights.SHARE * full
    assert calls
    stack.budget = Budget("min")
    assert_same(gradients(model), expected)
    assert stack.staying == 0


def test_they_go_for_an_evaluation_and_come_back(made):
    model, _, expected = made
    gradients(model)
    (stack,) = backbone._stacks.values()
    model.eval()
    with torch.no_grad():
        model(input_ids=batch())
    assert weights.staying(stack._fused()) == 0
    model.train()
    assert_same(gradients(model), expected)
    assert weights.staying(stack._fused()) > 0


def test_a_weight_that_was_changed_is_made_anew(made):
    model, calls, expected = made
    gradients(model)
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    weight.data.copy_(weight.data.flip(0))
    weight.data = weight.data.clone()
    del calls[:]
    loss, _ = gradients(model)
    assert calls
    assert not torch.equal(loss, expected[0])

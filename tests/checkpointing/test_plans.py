"""Plans for tiny models on a device whose memory is counted: what is kept fits, and gradients are stock's."""

import pytest
import torch
from counted import Counted
from lora_models import FAMILIES, batch, distance, gradients, lora_model

from sloth_plugins import patch, revert
from sloth_plugins.patches.blocks import decoder_layer, graphs
from sloth_plugins.patches.blocks.policy import Policy
from sloth_plugins.patches.checkpointing import backbone
from sloth_plugins.patches.checkpointing import bytes as formulas
from sloth_plugins.patches.checkpointing.budget import Budget
from sloth_plugins.patches.checkpointing.layers import Shape

LAYERS = 8
IDS = [kind for _, kind in FAMILIES]


@pytest.fixture
def device(monkeypatch):
    memory = Counted()
    monkeypatch.setattr(backbone, "memory_of", lambda device: memory)
    monkeypatch.setattr(backbone, "_stacks", type(backbone._stacks)())
    with memory.counting:
        yield memory


def deep(family=("llama", "llama"), layers=LAYERS, **changes):
    name, kind = family
    more = {"num_hidden_layers": layers, **changes}
    if kind in ("gemma2", "gemma3_text"):
        more["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    if kind == "ministral":
        more["layer_types"] = ["full_attention"] * layers
    return lora_model(name, kind, changes=more)


def step(model):
    """Loss and gradients for tokens that make activations the most of what is taken."""
    return gradients(model, batch(4, 40))


def plan(model, selection="*:blocks,*:checkpointing"):
    """Patch it and return what plans its layers, once that has learned."""
    patch(model, selection)
    step(model)
    step(model)
    (stack,) = backbone._stacks.values()
    assert stack.current is not None
    return stack


def unborn(stack):
    """Bytes of the gradients that are not there yet."""
    return sum(p.nbytes for p in stack.trained if p.grad is None)


def policies(stack):
    return [option.policy for option in stack.current.options]


def budgets(stack, model, shares):
    """Budgets from what the tightest plan takes, 0, to what the one that keeps everything does, 1."""
    predicted = []
    for kind in ("auto", "min"):
        stack.budget = Budget(kind)
        step(model)
        predicted.append(stack.predicted)
    full, tight = predicted
    return [Budget("bytes", tight + share * (full - tight)) for share in shares]


def test_there_are_graphs_only_while_there_is_room_for_twice_as_much(device, monkeypatch):
    asked, dropped = [], []
    monkeypatch.setattr(decoder_layer, "graph_for", lambda layer, run, *rest: asked.append(run.may_hold))
    monkeypatch.setattr(graphs, "drop", lambda: dropped.append(len(asked)))
    model = deep(layers=2)
    stack = plan(model)
    learning, taken = asked[:2], stack.current.peak
    assert not any(learning)
    for room, expected in ((3.0, True), (1.2, True), (0.9, False), (1.2, False), (3.0, True)):
        del asked[:]
        stack.budget = Budget("bytes", device.allocated() + unborn(stack) + room * taken)
        step(model)
        assert set(asked) == {expected}, room
    assert len(dropped) == 1


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_gradients_under_any_plan_are_those_of_keep(family, device, runs):
    model = deep(family, 4)
    expected = step(model)
    stack = plan(model)
    assert policies(stack) == [Policy.KEEP] * 4
    loss, kept = step(model)
    assert distance(kept, expected[1]) < 3e-5
    seen = set()
    for budget in [Budget("min"), *budgets(stack, model, (0.4, 0.7))]:
        stack.budget = budget
        found = step(model)
        assert torch.equal(found[0], loss)
        assert all(torch.equal(found[1][name], kept[name]) for name in kept)
        seen.add(tuple(policies(stack)))
    assert len(seen) > 1
    assert tuple([Policy.INPUT] * 4) in seen
    assert len(runs) == 4 * 8


def test_what_graphs_hold_is_not_expected_twice(device, monkeypatch):
    model = deep()
    stack = plan(model)
    whole, current = stack.predicted, stack.current
    for held, spared in ((160, current.peak - current.after), (80, 0)):
        monkeypatch.setattr(graphs, "tokens_held", lambda module, held=held: held)
        step(model)
        assert stack.current is current
        assert whole - stack.predicted == spared
    monkeypatch.setattr(graphs, "tokens_held", lambda module: 160 if module is stack.modules[0] else 0)
    step(model)
    assert whole - stack.predicted == current.options[0].kept


@pytest.mark.parametrize("family", [("llama", "llama"), ("gemma2", "gemma2"), ("phi", "phi")], ids=str)
def test_what_was_expected_is_what_is_taken(family, device):
    model = deep(family)
    stack = plan(model)
    assert stack.current.share == 0.0
    shares = []
    for budget in budgets(stack, model, (0.0, 0.5, 1.0)):
        stack.budget = budget
        model.zero_grad()
        ids = batch(4, 40)
        before = device.allocated()
        device.reset()
        model(input_ids=ids, labels=ids).loss.backward()
        taken, expected = device.peak() - before, stack.predicted - before
        assert stack.predicted <= budget.value
        # The work of a layer is measured once, when all of it is computed again; what it is where that is kept follows
        # from the kernels, of which torch's references hold more.
        assert 0.85 < taken / expected < 1.13
        shares.append(stack.current.share)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.7
    assert shares[-1] < 0.15
    step_of_kinds = 2 if family[0] == "gemma2" else 1
    for kind in range(step_of_kinds):
        kept = [option.kept for option in stack.current.options[kind::step_of_kinds]]
        assert kept == sorted(kept)


@pytest.mark.parametrize("tokens", [8, 160])
def test_gradients_as_large_as_the_model_come_while_activations_go(tokens, device):
    model = deep(layers=6).base_model.model
    model.requires_grad_(True)
    patch(model, "*:checkpointing")
    rows = max(1, tokens // 40)

    def taken():
        model.zero_grad()
        ids = batch(rows, tokens // rows)
        before = device.allocated()
        device.reset()
        model(input_ids=ids, labels=ids).loss.backward()
        return device.peak() - before, before

    for _ in range(4):
        taken()
    (stack,) = backbone._stacks.values()
    gradients = sum(p.nbytes for p in model.parameters())
    for kind in ("auto", "min"):
        stack.budget = Budget(kind)
        taken()
        found, before = taken()
        assert stack.current.share == (0.0 if kind == "auto" else 1.0)
        # Added to what is kept they would be as much again where tokens are few.
        assert 0.85 < found / (stack.predicted - before) < 1.02
    assert (gradients > 0.7 * found) is (tokens == 8)


@pytest.mark.parametrize("late", [False, True])
def test_layers_without_a_backward_keep_nothing(late, device):
    config = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [3, 4, 5]} if late else {}
    model = lora_model(changes={"num_hidden_layers": 6}, **config)
    stack = plan(model)
    assert [option.kept > 0 for option in stack.current.options] == [not late] * 3 + [True] * 3
    stack.budget = Budget("min")
    step(model)
    assert policies(stack)[3:] == [Policy.INPUT] * 3


def test_frozen_layers_of_upstreams_below_trained_ones(device):
    model = deep(layers=6).base_model.model
    model.requires_grad_(True)
    model.model.embed_tokens.requires_grad_(False)
    for layer in model.model.layers[:3]:
        layer.requires_grad_(False)
    patch(model, "*:checkpointing")
    for _ in range(4):
        step(model)
    (stack,) = backbone._stacks.values()
    stack.budget = Budget("min")
    device.reset()
    before = device.allocated()
    step(model)
    assert policies(stack)[3:] == [Policy.INPUT] * 3
    assert device.peak() - before < 1.3 * (stack.predicted - before)


def test_a_smaller_budget_is_another_plan(device):
    """Though it is as many grains of its own size."""
    model = deep(layers=4)
    stack = plan(model)
    for size in (2**34, 2**33, stack.predicted, stack.predicted // 2):
        stack.memory.size = size
        step(model)
        assert stack.predicted <= size or not stack.current.fits or stack.current.share > 0


def test_padding_that_comes_later_is_counted(device):
    model = deep(layers=4)
    stack = plan(model)
    mask = torch.ones(4, 40, dtype=torch.long)
    mask[0, 30:] = 0
    ids = batch(4, 40)
    before = stack.current.peak
    for _ in range(2):
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    assert stack._ways >= {"graph"}
    assert stack.current.peak >= before


def test_inference_mode(device):
    model = deep(layers=2)
    plan(model)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    with torch.inference_mode():
        expected = model(input_ids=batch(1, 24), position_ids=positions).logits
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=batch(1, 24), position_ids=positions).logits, expected)


def test_what_does_not_grow_with_tokens_may_be_no_part_of_the_worst_moment(device, monkeypatch):
    """Weights that are made for a product, say: without them, more tokens would take less than they do."""
    work = formulas.work
    monkeypatch.setattr(formulas, "work", lambda *args: work(*args) + 2**24)
    model = deep(layers=4)
    stack = plan(model)
    learned = stack._expected(Shape(160, 6400))[0]
    for tokens in (40, 640):
        for layer, other in zip(learned, stack._expected(Shape(tokens, 6400))[0], strict=True):
            for option, same in zip(other, layer, strict=True):
                share = tokens / 160
                assert option.work >= share * same.work - 8
                assert tokens < 160 or option.work <= share * same.work + 8


def test_plans_are_found_again(device, monkeypatch):
    model = deep(layers=4)
    stack = plan(model)
    solved = []
    solve = type(stack)._solve
    monkeypatch.setattr(type(stack), "_solve", lambda self, *args: (solved.append(args), solve(self, *args))[1])
    for length in (40, 32, 33, 32, 40):
        gradients(model, batch(3, length))
    # 96 tokens and 99 are one bucket, 120 another.
    assert [shape.tokens for shape, *_ in solved] == [120, 96, 100]


def test_a_much_larger_micro_batch_is_measured_again(device):
    model = deep(layers=4)
    stack = plan(model)
    stack.memory.size = stack.predicted
    gradients(model, batch(8, 60))
    assert stack.current is None
    gradients(model, batch(8, 60))
    assert stack.current is not None
    assert stack.predicted <= stack.memory.size or not stack.current.fits


def test_small_micro_batches_keep_what_large_ones_cannot(device):
    model = deep(layers=4)
    stack = plan(model)
    (stack.budget,) = budgets(stack, model, (0.2,))
    step(model)
    assert stack.current.share > 0.3
    gradients(model, batch(4, 8))
    assert stack.current.share == 0.0


def test_evaluation_and_generation_are_not_planned(device):
    model = deep(layers=4)
    stack = plan(model)
    with torch.no_grad():
        model(input_ids=batch())
    model.eval()
    before = stack.current
    model(input_ids=batch(1, 5)).logits.sum().backward()
    assert stack.current is before


def test_revert_takes_it_away(device, runs):
    model = deep(layers=4)
    stack = plan(model)
    stack.budget = Budget("min")
    revert(model)
    before = stack.current
    step(model)
    assert stack.current is before


def test_layers_that_become_blocks_are_measured_anew(device, runs):
    model = deep(layers=4)
    patch(model, "*:checkpointing")
    for _ in range(3):
        expected = step(model)
    (stack,) = backbone._stacks.values()
    assert stack.current is not None
    assert not runs
    revert(model)
    patch(model, "*:blocks,*:checkpointing")
    for _ in range(4):
        loss, found = step(model)
    assert stack.current is not None
    assert policies(stack) == [Policy.KEEP] * 4
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    assert distance(found, expected[1]) < 1e-5


FOREIGN = {"full fine-tuning": "*:blocks,*:checkpointing", "without blocks": "*:checkpointing"}


@pytest.mark.parametrize("selection", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("enabled", [False, True])
def test_layers_of_upstreams_are_checkpointed_one_by_one(selection, enabled, device):
    model = deep(layers=4)
    model.base_model.model.requires_grad_(True)
    expected = step(model)
    if enabled:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    patch(model, selection)
    for _ in range(3):
        step(model)
    (stack,) = backbone._stacks.values()
    assert stack.current is not None
    counts = {}
    for share, budget in zip((0.0, 0.5, 1.0), budgets(stack, model, (0.0, 0.5, 1.0)), strict=True):
        stack.budget = budget
        model.zero_grad()
        device.reset()
        loss, found = step(model)
        counts[share] = policies(stack).count(Policy.INPUT)
        assert device.peak() < 1.05 * stack.predicted
        assert torch.equal(loss, expected[0])
        assert all(torch.equal(found[name], expected[1][name]) for name in found)
        del loss, found
    assert counts[0.0] > counts[0.5] > counts[1.0]
    revert(model)
    layer = model.base_model.model.model.layers[0]
    assert layer.gradient_checkpointing is enabled
    assert ("_gradient_checkpointing_func" in vars(layer)) is enabled

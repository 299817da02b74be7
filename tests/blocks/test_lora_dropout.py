"""LoRA's dropout: masks that are made again from their seeds, in the forward's place in the backward."""

import copy

import pytest
import torch
from lora_models import batch, distance, fuse, gradients, lora_model

from sloth_plugins.patches.blocks import group
from sloth_plugins.patches.blocks.policy import Policy, choosing
from sloth_plugins.patches.kernels.ops.dropout import dropped

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ("qkv", "o", "up", "down")


def replay(stock, model, runs):
    """Give each of stock's dropout modules the mask that the fused run drew for it."""
    names = {id(module): name for name, module in model.named_modules()}
    for run in runs:
        for key, of_layer in zip(NAMES, run.parts.groups, strict=True):
            for projection, seed in zip(of_layer.projections, run.seeds[key], strict=True):
                owner = stock.get_submodule(names[id(projection.base)].removesuffix(".base_layer"))
                if not hasattr(owner, "lora_dropout"):
                    continue
                module = owner.lora_dropout["default"]
                if not isinstance(module, torch.nn.Dropout) or module.p == 0.0:
                    continue

                def forward(x, p=module.p, seed=seed):
                    flat = x.reshape(-1, x.shape[-1])
                    mask = dropped(torch.ones_like(flat), p, seed)
                    assert torch.equal(flat.detach() * mask, dropped(flat.detach(), p, seed))
                    return (flat * mask).view(x.shape)

                module.forward = forward


PROBABILITIES = {
    "one for all": lambda name: 0.3,
    "one for each": lambda name: {"q_proj": 0.1, "k_proj": 0.0, "v_proj": 0.9, "up_proj": 0.0}.get(name, 0.5),
    "everything": lambda name: 1.0 if name in ("v_proj", "down_proj") else 0.2,
    "only down": lambda name: 0.4 if name == "down_proj" else 0.0,
}


def model_with_dropout(probabilities=PROBABILITIES["one for all"], family=("llama", "llama"), **config):
    model = lora_model(*family, lora_dropout=0.5, **config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" in name:
            module.p = probabilities(name.split(".")[-3])
    return model


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("probabilities", PROBABILITIES)
def test_gradients_are_those_of_the_same_masks(probabilities, policy, runs):
    model = model_with_dropout(PROBABILITIES[probabilities])
    stock = copy.deepcopy(model)
    fuse(model)
    with choosing(lambda *_: policy):
        loss, found = gradients(model)
    assert [run.policy for run in runs] == [policy] * 2
    replay(stock, model, runs)
    expected_loss, expected = gradients(stock)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    # An adapter whose input is all zero has no gradient to measure a distance by.
    for name in [name for name in expected if not expected[name].any()]:
        assert not found.pop(name).any()
        del expected[name]
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("family", [("phi3", "phi3"), ("phi", "phi"), ("gemma3", "gemma3_text")], ids=lambda f: f[0])
def test_other_layouts(family, runs):
    model = model_with_dropout(family=family)
    stock = copy.deepcopy(model)
    fuse(model)
    found = gradients(model)[1]
    replay(stock, model, runs)
    assert distance(found, gradients(stock)[1]) < 1e-5


def test_all_policies_agree_to_the_bit():
    model = model_with_dropout(PROBABILITIES["one for each"])
    fuse(model)
    results = []
    for policy in Policy:
        torch.manual_seed(11)
        with choosing(lambda *_, policy=policy: policy):
            results.append(gradients(model))
    for loss, found in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(found[name], results[0][1][name]) for name in found)


@pytest.mark.parametrize("policy", list(Policy))
def test_the_backwards_masks_are_the_forwards(policy, monkeypatch):
    """Each projection has a seed of its own; the backward uses it for dx and dA, on a tensor of the same shape."""
    made = []

    def recorded(function, at):
        def record(*args):
            *_, x, p, seed = args
            made.append((at, tuple(x.shape), p, seed))
            return function(*args)

        return record

    monkeypatch.setattr(group, "dropped", recorded(group.dropped, "product"))
    monkeypatch.setattr(group, "add_dropped", recorded(group.add_dropped, "input"))
    model = model_with_dropout()
    model.enable_input_require_grads()
    fuse(model)
    with choosing(lambda *_: policy):
        loss = model(input_ids=batch(), labels=batch()).loss
        forward = list(made)
        assert len(forward) == len({seed for *_, seed in forward}) == 14
        loss.backward()
    backward = made[14:]
    assert len(backward) == 28, "low-rank products are kept, so no mask is made a third time"
    for at in ("product", "input"):
        assert sorted(item[1:] for item in backward if item[0] == at) == sorted(item[1:] for item in forward)


def test_seeds_come_from_torchs_generator(runs):
    model = model_with_dropout()
    fuse(model)
    torch.manual_seed(5)
    first = gradients(model)
    second = gradients(model)
    torch.manual_seed(5)
    again = gradients(model)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    assert not torch.equal(first[0], second[0])
    assert runs[0].seeds == runs[4].seeds != runs[2].seeds


def test_without_dropout_no_random_number_is_drawn(runs):
    model = lora_model()
    fuse(model)
    state = torch.get_rng_state()
    gradients(model)
    assert len(runs) == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_eval_has_none(runs):
    model = model_with_dropout()
    fuse(model)
    trained = gradients(model)[0]
    expected = gradients(model.eval())
    assert torch.equal(gradients(model)[0], expected[0])
    assert not torch.equal(trained, expected[0])
    stock = gradients(model_with_dropout().eval())
    torch.testing.assert_close(expected[0], stock[0], rtol=1e-6, atol=0)
    assert distance(expected[1], stock[1]) < 1e-5
    assert len(runs) == 6


def test_a_dropout_module_in_eval_mode_alone(runs):
    """Which counts is the dropout's own mode."""
    model = model_with_dropout(PROBABILITIES["only down"])
    for layer in model.base_model.model.model.layers:
        layer.mlp.down_proj.lora_dropout.eval()
    expected = gradients(model)
    fuse(model)
    found = gradients(model)
    assert len(runs) == 2
    assert torch.equal(gradients(model)[0], found[0])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)


def test_checkpointed_by_the_user(runs):
    """torch.utils.checkpoint puts the generator back, so the recomputation draws the same seeds."""
    model = model_with_dropout(changes={"num_key_value_heads": 4, "head_dim": 16})
    fuse(model)
    expected = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        layer = model.base_model.model.model.layers[1]
        if checkpointed:
            call = layer.forward
            layer.forward = lambda *args, call=call, **kwargs: torch.utils.checkpoint.checkpoint(
                call, *args, use_reentrant=False, **kwargs
            )
        expected.append(gradients(model))
    assert torch.equal(expected[0][0], expected[1][0])
    assert all(torch.equal(expected[0][1][name], expected[1][1][name]) for name in expected[0][1])
    assert len(runs) == 2 + 3

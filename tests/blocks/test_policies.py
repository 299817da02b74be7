"""Every policy of every family gives stock's gradients, and all policies give the same ones to the bit."""

import pytest
import torch
from lora_models import FAMILIES, batch, distance, fuse, gradients, lora_model

from sloth_plugins import revert
from sloth_plugins.patches.blocks import decoder_layer
from sloth_plugins.patches.blocks.policy import Policy, choosing


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The runs of fused layers, so that no test passes on upstream's forward."""
    seen = []
    run = decoder_layer._Fused.run
    monkeypatch.setattr(
        decoder_layer._Fused, "run", lambda self, *args: (seen.append(args[0].policy), run(self, *args))[1]
    )
    return seen


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("family", FAMILIES, ids=[kind for _, kind in FAMILIES])
def test_gradients_are_stocks(family, policy, calls):
    model = lora_model(*family)
    expected_loss, expected = gradients(model)
    assert fuse(model) == 2
    with choosing(lambda *_: policy):
        loss, found = gradients(model)
    assert calls == [policy] * 2
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES, ids=[kind for _, kind in FAMILIES])
def test_all_policies_agree_to_the_bit(family):
    model = lora_model(*family)
    fuse(model)
    results = []
    for policy in Policy:
        with choosing(lambda *_, policy=policy: policy):
            results.append(gradients(model))
    for loss, found in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(found[name], results[0][1][name]) for name in results[0][1])


def test_gradient_checkpointing_means_input_only(calls):
    model = lora_model()
    expected = gradients(model)[1]
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    fuse(model)
    found = gradients(model)[1]
    assert calls == [Policy.INPUT] * 2
    assert distance(found, expected) < 1e-5
    revert(model)
    assert distance(gradients(model)[1], expected) < 1e-5
    assert len(calls) == 2


def test_padding_and_packing_are_upstreams(calls):
    model = lora_model()
    ids = batch(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    stock = [gradients(model, ids, attention_mask=mask)[1], gradients(model, ids[:1], position_ids=positions)[1]]
    fuse(model)
    fused = [gradients(model, ids, attention_mask=mask)[1], gradients(model, ids[:1], position_ids=positions)[1]]
    assert len(calls) == 4
    for found, expected in zip(fused, stock, strict=True):
        assert distance(found, expected) < 1e-5


def test_a_cache_that_training_makes_anew_is_filled(calls):
    model = lora_model()
    model.config.use_cache = True
    ids = batch()
    expected, stock = gradients(model, ids)[1], model(input_ids=ids).past_key_values
    fuse(model)
    found, cache = gradients(model, ids)[1], model(input_ids=ids).past_key_values
    assert len(calls) == 4
    assert distance(found, expected) < 1e-5
    for layer in range(2):
        for ours, theirs in zip(cache.layers[layer].keys, stock.layers[layer].keys, strict=True):
            torch.testing.assert_close(ours, theirs)

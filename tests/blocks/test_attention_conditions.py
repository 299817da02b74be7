"""Attention that upstream must run itself, and somebody else's that a fused layer calls."""

import pytest
import torch
from lora_models import batch, distance, fuse, gradients, lora_model
from transformers.cache_utils import DynamicCache
from transformers.models.llama import modeling_llama

pytestmark = pytest.mark.filterwarnings("ignore")


def layers_of(model):
    return model.base_model.model.model.layers


def test_attention_weights(runs, said):
    """They are captured with hooks that stay, and that do nothing once no weights are asked for."""
    model = lora_model()
    model.set_attn_implementation("eager")
    ids = batch()
    expected = model(input_ids=ids, output_attentions=True).attentions
    fuse(model)
    found = model(input_ids=ids, output_attentions=True).attentions
    assert not runs
    assert len(found) == len(expected) == 2
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert any("attention weights are asked for" in line for line in said)
    gradients(model)
    assert len(runs) == 2


def test_hidden_states(runs):
    model = lora_model()
    ids = batch()
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states
    fuse(model)
    found = model(input_ids=ids, output_hidden_states=True).hidden_states
    for ours, stock in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, stock)
    gradients(model)
    assert len(runs) >= 2


def test_a_cache(runs, said):
    model = lora_model().eval()
    ids = batch()
    expected, found = DynamicCache(), DynamicCache()
    with torch.no_grad():
        logits = model(input_ids=ids, past_key_values=expected).logits
        fuse(model)
        assert torch.equal(model(input_ids=ids, past_key_values=found).logits, logits)
    assert not runs
    assert found.get_seq_length() == expected.get_seq_length() == ids.shape[1]
    # Generating is no training that somebody would wonder about.
    assert not said
    model.train()
    ids = batch()
    past = model(input_ids=ids[:, :6], use_cache=True).past_key_values
    model(input_ids=ids[:, 6:], past_key_values=past)
    assert any("a cache of keys and values is read" in line for line in said)


def error_of(function):
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return ""


def test_gradients_through_a_cache():
    """A cache that one forward fills may be read by the next; what then reaches its adapters is right, or an error."""
    ids, results = batch(), []
    for fused in (False, True):
        model = lora_model()
        model.config.use_cache = True
        if fused:
            fuse(model)
        past = model(input_ids=ids[:, :6], use_cache=True).past_key_values
        loss = model(input_ids=ids[:, 6:], labels=ids[:, 6:], past_key_values=past).loss
        error = error_of(loss.backward)
        if fused and "differentiated" in error:
            return
        assert not error
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert distance(results[1], results[0]) < 1e-5


def test_an_attention_that_is_not_installed(runs, said):
    model = lora_model()
    fuse(model)
    model.config._attn_implementation = "flash_attention_99"
    x, ids = torch.randn(1, 4, 48), torch.arange(4)[None]
    tables = model.base_model.model.model.rotary_emb(x, ids)
    with pytest.raises(KeyError, match="flash_attention_99"):
        layers_of(model)[0](x, attention_mask=None, position_embeddings=tables)
    assert not runs
    assert any("attn_implementation 'flash_attention_99' is not installed" in line for line in said)


def test_somebody_elses_attention_under_upstreams_name(runs, monkeypatch):
    functions, calls = modeling_llama.ALL_ATTENTION_FUNCTIONS, []
    upstream = functions["sdpa"]

    def halved(*args, **kwargs):
        calls.append(1)
        out, weights = upstream(*args, **kwargs)
        return 0.5 * out, weights

    monkeypatch.setitem(functions, "sdpa", halved)
    model = lora_model()
    expected = gradients(model)[1]
    fuse(model)
    assert distance(gradients(model)[1], expected) < 1e-5
    assert len(runs) == 2
    assert len(calls) == 4

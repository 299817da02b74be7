"""Bytes in closed form against those of the storages that live between forward and backward."""

import pytest
import torch
from live_bytes import LiveBytes
from lora_models import FAMILIES, batch, fuse, lora_model
from test_quantised import quantised, with_adapters

from sloth_plugins.patches.blocks.policy import Policy, choosing
from sloth_plugins.patches.checkpointing import bytes as formulas

IDS = [kind for _, kind in FAMILIES]
# Everybody attends through torch's kernel, whose statistics are known; the graph of another function is counted.
DIRECT = {"num_key_value_heads": 4, "head_dim": 16}


def living(model, ids):
    """Bytes that live after the forward and before the backward."""
    with LiveBytes() as count:
        loss = model(input_ids=ids, labels=ids).loss
    held = count.living()
    loss.backward()
    return held


def without_masks(kind, layers):
    """Changes to a tiny model so that its layers attend to all before, without a window and without a softcap."""
    changes = {"num_hidden_layers": layers, **DIRECT}
    if kind in ("gemma2", "gemma3_text", "ministral"):
        changes["layer_types"] = ["full_attention"] * layers
    if kind == "gemma2":
        changes["attn_logit_softcapping"] = None
    if kind == "mistral":
        changes["sliding_window"] = None
    return changes


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_bytes_of_a_layer(family, policy, runs):
    """Those by which a model with two layers more keeps more."""
    held = []
    for layers in (2, 4):
        model = lora_model(*family, changes=without_masks(family[1], layers))
        # Gemma 2 has a softcap, which sdpa has not, and so is eager unless it is told otherwise.
        model.config._attn_implementation = "sdpa"
        assert fuse(model) == layers
        with choosing(lambda *_: policy):
            living(model, batch())
            held.append(living(model, batch()))
    assert all(run.attention.is_plain for run in runs), "this compares torch's kernel"
    expected = formulas.kept(runs[0].parts, batch().numel(), policy, 4)
    assert (held[1] - held[0]) / 2 == pytest.approx(expected, rel=0.01)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("policy", list(Policy))
def test_bytes_of_a_layer_with_room(policy, runs):
    """What lies behind gate and up for the backward is kept with them; what a weight is made with goes at once."""
    held = []
    for layers in (2, 4):
        model, _ = quantised(sizes={"num_hidden_layers": layers, "num_key_value_heads": 4})
        model = with_adapters(model, 8)
        assert fuse(model) == layers
        with torch.compiler.set_stance("force_eager"), choosing(lambda *_: policy):
            living(model, batch())
            held.append(living(model, batch()))
    parts = runs[0].parts
    assert parts.up.room == 16
    expected = formulas.kept(parts, batch().numel(), policy, 4)
    assert (held[1] - held[0]) / 2 == pytest.approx(expected, rel=0.01)

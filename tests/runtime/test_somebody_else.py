"""What others set after, or under, our patches: it is neither lost nor run into."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, activations
from transformers.models.qwen3 import modeling_qwen3

import sloth_plugins
from sloth_plugins.application import patched
from sloth_plugins.patches.conventions import TINY

IDS = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(1))


def model(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY)).eval()


def logits(network):
    with torch.no_grad():
        return network(input_ids=IDS).logits


def test_a_rotary_function_set_after_the_patch_is_run_and_the_norms_before_it(monkeypatch):
    real = modeling_qwen3.apply_rotary_pos_emb

    def halved(q, k, cos, sin, unsqueeze_dim=1):
        return real(0.5 * q, k, cos, sin, unsqueeze_dim)

    network, stock = model("qwen3"), model("qwen3")
    sloth_plugins.patch(network, "1")
    expected = logits(stock)
    torch.testing.assert_close(logits(network), expected)
    monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", halved)
    theirs = logits(stock)
    assert not torch.allclose(theirs, expected)
    torch.testing.assert_close(logits(network), theirs)


def test_an_activation_whose_class_somebody_changed_runs_as_changed(monkeypatch):
    network, stock = model("llama"), model("llama")
    sloth_plugins.patch(network, "1")
    assert any(patched(module) for module in network.modules())
    expected = logits(stock)
    monkeypatch.setattr(activations.SiLUActivation, "forward", lambda self, x: 2 * torch.nn.functional.silu(x))
    theirs = logits(stock)
    assert not torch.allclose(theirs, expected)
    torch.testing.assert_close(logits(network), theirs)


@pytest.mark.parametrize("before", [True, False], ids=["patched before", "never patched"])
def test_a_frozen_model_is_told_what_it_runs(before, capsys):
    from sloth_plugins.activation import activate, deactivate, enter

    network = model("llama")
    activate("1")
    try:
        if before:
            enter(network)
        network.requires_grad_(False)
        enter(network)
    finally:
        deactivate()
    said = capsys.readouterr().err
    wanted = "keeps the patches that it has" if before else "stays stock"
    assert f"has nothing to train and {wanted}" in said
    assert any(patched(module) for module in network.modules()) is before

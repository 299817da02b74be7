"""Gradient checkpointing of layers that cannot run fused is upstream's, and an exception leaves everything in place."""

import pytest
import torch
from lora_models import distance, fuse, gradients, lora_model
from torch import nn
from torch.utils import checkpoint as torch_checkpoint

from sloth_plugins.patches.blocks.policy import Policy

pytestmark = pytest.mark.filterwarnings("ignore")


def layers_of(model):
    return model.base_model.model.model.layers


def checkpointed(use_reentrant, **config):
    model = lora_model(**config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model


def counted(module):
    """The forwards of a module, counted with a hook, which also makes its layer fall back."""
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_upstream_checkpoints_what_is_not_fused(use_reentrant, runs, said):
    model = checkpointed(use_reentrant)
    calls = counted(layers_of(model)[0].mlp)
    expected = gradients(model)
    once = list(calls)
    assert len(once) == 2, "forward and recomputation"
    fuse(model)
    found = gradients(model)
    assert calls == once * 2
    assert [run.policy for run in runs] == [Policy.INPUT]
    assert any("mlp has hooks" in line for line in said)
    assert torch.equal(found[0], expected[0])
    assert distance(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_fused_layer_has_no_checkpoint_around_it(use_reentrant, runs, monkeypatch):
    model = checkpointed(use_reentrant)
    expected = gradients(model)[1]
    functions = [layer._gradient_checkpointing_func for layer in layers_of(model)]
    fuse(model)

    def refuse(*args, **kwargs):
        raise AssertionError("checkpointed")

    monkeypatch.setattr(torch_checkpoint, "_checkpoint_without_reentrant_generator", refuse)
    monkeypatch.setattr(torch_checkpoint.CheckpointFunction, "apply", refuse)
    assert distance(gradients(model)[1], expected) < 1e-5
    assert [run.policy for run in runs] == [Policy.INPUT] * 2
    assert [layer._gradient_checkpointing_func for layer in layers_of(model)] == functions


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_lora_dropout_with_a_fallback(use_reentrant, runs):
    """The recomputation of a layer that fell back has upstream's masks, drawn again."""
    losses = []
    model = checkpointed(use_reentrant, lora_dropout=0.3)
    for layer in layers_of(model):
        counted(layer.mlp)
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(gradients(model))
        if len(losses) == 1:
            fuse(model)
    assert not runs
    assert torch.equal(losses[0][0], losses[1][0])
    assert distance(losses[1][1], losses[0][1]) < 1e-6


class Interrupted(nn.Module):
    def forward(self, x):
        raise KeyboardInterrupt


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "upstream"])
def test_an_interrupt_leaves_checkpointing_as_it_was(fused, use_reentrant, runs, monkeypatch):
    model = checkpointed(use_reentrant)
    fuse(model)
    expected = gradients(model)[1]
    before = [dict(vars(layer)) for layer in layers_of(model)]
    if fused:
        from sloth_plugins.patches.blocks import mlp_block

        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(mlp_block, "enter", interrupt)
            with pytest.raises(KeyboardInterrupt):
                gradients(model)
    else:
        held = layers_of(model)[1].mlp
        layers_of(model)[1].mlp = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            gradients(model)
        layers_of(model)[1].mlp = held
    assert [dict(vars(layer)) for layer in layers_of(model)] == before
    assert all(layer.gradient_checkpointing for layer in layers_of(model))
    assert distance(gradients(model)[1], expected) < 1e-6


def test_checkpointing_switched_on_and_off(runs):
    model = lora_model()
    expected = gradients(model)[1]
    fuse(model)
    policies = []
    for step in ("enable", "disable", "enable"):
        getattr(model, f"gradient_checkpointing_{step}")()
        for train in (True, False):
            model.train(train)
            assert distance(gradients(model)[1], expected) < 1e-5
            policies += [Policy.INPUT if train and step == "enable" else Policy.KEEP] * 2
    assert [run.policy for run in runs] == policies

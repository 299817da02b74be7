"""Tiny models of every family with LoRA, stock and with only their blocks fused."""

import torch
from peft import LoraConfig, get_peft_model
from tiny_families import KINDS, KNOWN
from tiny_families import batch as batch
from tiny_families import gradients as gradients

from sloth_plugins import patch
from sloth_plugins.patches.blocks.policy import Policy, choosing
from sloth_plugins.testing import tiny_model

FAMILIES = KINDS


def lora_model(architecture="llama", kind="llama", seed=0, dtype=torch.float32, changes=None, **config):
    """A tiny model with adapters on every projection, whose B are not zero."""
    model = tiny_model(KNOWN.architectures[architecture], kind, seed=seed, **(changes or {})).to(dtype)
    model.config.use_cache = False
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **config}
    return get_peft_model(model, LoraConfig(**options), autocast_adapter_dtype=dtype is torch.float32).train()


def fuse(model, family="*"):
    """Fuse the blocks and nothing else; returns how many layers."""
    report = patch(model, f"{family}:blocks")
    (outcome,) = [o for o in report.outcomes if o.patch == "blocks" and o.state != "off"]
    assert outcome.state == "applied", outcome.reason
    return outcome.modules


def distance(found, expected):
    """The largest relative distance of two dicts of gradients."""
    assert found.keys() == expected.keys()
    return max(((found[n] - expected[n]).norm() / expected[n].norm()).item() for n in expected)


def assert_every_policy(model, runs, expected, policies=tuple(Policy)):
    """Fused, the model has this loss and these gradients under each policy; `runs` holds what ran fused."""
    expected_loss, expected_gradients = expected
    assert fuse(model) == 2
    for policy in policies:
        with choosing(lambda *_, policy=policy: policy):
            loss, found = gradients(model)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
        assert distance(found, expected_gradients) < 1e-5
    assert [run.policy for run in runs] == [policy for policy in policies for _ in range(2)]

"""Tiny models of every family with LoRA, stock and with only their blocks fused."""

import torch
from peft import LoraConfig, get_peft_model

from sloth_plugins import patch
from sloth_plugins.discovery import Plugins
from sloth_plugins.testing import tiny_model

torch.set_num_threads(1)

KNOWN = Plugins(load_entry_points=False)
FAMILIES = [
    (name, kind)
    for name, spec in KNOWN.architectures.items()
    if spec.tiny and "model_type" not in spec.tiny
    for kind in spec.model_types
]


def lora_model(architecture="llama", kind="llama", seed=0, dtype=torch.float32, changes=None, **config):
    """A tiny model with adapters on every projection, whose B are not zero."""
    model = tiny_model(KNOWN.architectures[architecture], kind, seed=seed, **(changes or {})).to(dtype)
    model.config.use_cache = False
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **config}
    return get_peft_model(model, LoraConfig(**options), autocast_adapter_dtype=dtype is torch.float32).train()


def batch(rows=2, length=13, vocabulary=96, seed=3):
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, ids=None, **kwargs):
    """The loss, and the gradient of every trainable parameter."""
    ids = batch() if ids is None else ids
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


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

"""Tiny models of every architecture that declares `tiny`, and what a model is made of, object for object."""

import gc
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sloth_plugins.discovery import Plugins

# Tiny models gain nothing from threads, and lose much where several processes share two cores.
torch.set_num_threads(1)

KNOWN = Plugins(load_entry_points=False)
KINDS = [(name, kind) for name, spec in KNOWN.architectures.items() if spec.tiny for kind in spec.model_types]
PATCHES = [(name, kind, patch.name) for name, kind in KINDS for patch in KNOWN.patches(name)]


def build(architecture, kind, seed=0, **changes):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**KNOWN.architectures[architecture].tiny, **changes})
    return AutoModelForCausalLM.from_config(config)


def batch(rows=2, length=13, vocabulary=96, seed=3):
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, ids=None, **kwargs):
    """Loss and the gradient of every trainable parameter."""
    ids = batch() if ids is None else ids
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def anatomy(model):
    """Every object a model is made of, by identity, with the functions that its modeling file holds."""
    gc.collect()  # a patched model of an earlier test holds its functions until it is collected
    parts = {}
    for name, module in model.named_modules():
        home = sys.modules[type(module).__module__]
        parts[name] = (type(module), tuple(sorted(vars(module))))
        parts[name, "functions"] = {
            key: id(value) for key, value in vars(home).items() if callable(value) and not key.startswith("__")
        }
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules", "training"):
                parts[name, key] = id(value)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        parts[name, "tensor"] = (id(tensor), tensor.data_ptr())
    return parts


def assert_close(found, expected, factor=40):
    """Equal to a small multiple of fp32 rounding; the float64 comparison stands in test_accuracy.py."""
    (loss, grads), (expected_loss, expected_grads) = found, expected
    assert torch.allclose(loss, expected_loss, rtol=1e-6, atol=0)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        scale = expected_grads[name].norm()
        assert (grad - expected_grads[name]).norm() <= factor * torch.finfo(torch.float32).eps * scale, name

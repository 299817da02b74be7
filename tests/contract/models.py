"""Tiny models of every architecture that declares `tiny`, and their gradients."""

import torch
from tiny_families import KINDS as KINDS
from tiny_families import KNOWN as KNOWN
from tiny_families import batch as batch
from tiny_families import gradients as gradients

from sloth_plugins.testing import anatomy as anatomy
from sloth_plugins.testing import tiny_model

PATCHES = [(name, kind, patch.name) for name, kind in KINDS for patch in KNOWN.patches(name)]


def build(architecture, kind, seed=0, **changes):
    return tiny_model(KNOWN.architectures[architecture], kind, seed=seed, **changes)


def assert_close(found, expected, factor=40):
    """Equal to a small multiple of fp32 rounding; the float64 comparison stands in test_accuracy.py."""
    (loss, grads), (expected_loss, expected_grads) = found, expected
    assert torch.allclose(loss, expected_loss, rtol=1e-6, atol=0)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        scale = expected_grads[name].norm()
        assert (grad - expected_grads[name]).norm() <= factor * torch.finfo(torch.float32).eps * scale, name

"""Tiny models of every architecture that declares `tiny`, and their gradients."""

import torch

from sloth_plugins.discovery import Plugins
from sloth_plugins.testing import anatomy as anatomy
from sloth_plugins.testing import tiny_model

# Tiny models gain nothing from threads, and lose much where several processes share two cores.
torch.set_num_threads(1)

KNOWN = Plugins(load_entry_points=False)
# A part of a larger model has its own tests (runtime/test_towers.py) and its cells in the matrix.
KINDS = [
    (name, kind)
    for name, spec in KNOWN.architectures.items()
    if spec.tiny and "model_type" not in spec.tiny
    for kind in spec.model_types
]
PATCHES = [(name, kind, patch.name) for name, kind in KINDS for patch in KNOWN.patches(name)]


def build(architecture, kind, seed=0, **changes):
    return tiny_model(KNOWN.architectures[architecture], kind, seed=seed, **changes)


def batch(rows=2, length=13, vocabulary=96, seed=3):
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, ids=None, **kwargs):
    """Loss and the gradient of every trainable parameter."""
    ids = batch() if ids is None else ids
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, factor=40):
    """Equal to a small multiple of fp32 rounding; the float64 comparison stands in test_accuracy.py."""
    (loss, grads), (expected_loss, expected_grads) = found, expected
    assert torch.allclose(loss, expected_loss, rtol=1e-6, atol=0)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        scale = expected_grads[name].norm()
        assert (grad - expected_grads[name]).norm() <= factor * torch.finfo(torch.float32).eps * scale, name

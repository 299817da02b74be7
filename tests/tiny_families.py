"""Which families there are to make tiny models of, a batch for them, and their gradients."""

import torch

from sloth_plugins.discovery import Plugins

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


def batch(rows=2, length=13, vocabulary=96, seed=3):
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, ids=None, **kwargs):
    """Loss and the gradient of every trainable parameter."""
    ids = batch() if ids is None else ids
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

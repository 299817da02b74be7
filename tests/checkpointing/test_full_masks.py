"""Masks of which the host knows that they hide nothing: nobody looks at them on the device; all else is as it was."""

import pytest
import torch
from lora_models import FAMILIES, batch, gradients, lora_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BatchEncoding

from sloth_plugins import patch, revert
from sloth_plugins.patches.checkpointing import full_masks

aten = torch.ops.aten


class Questions(TorchDispatchMode):
    """Counts how often a whole mask is summed up or tested."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        of_mask = bool(args) and isinstance(args[0], torch.Tensor) and args[0].shape == self.shape
        self.count += of_mask and func.overloadpacket in (aten.sum, aten.all)
        return func(*args, **(kwargs or {}))


def asked(model, ids, mask):
    with Questions(mask.shape) as questions:
        loss, grads = gradients(model, ids, attention_mask=mask)
    return questions.count, loss, grads


@pytest.mark.parametrize(("name", "kind"), FAMILIES)
def test_nobody_asks_for_what_is_known(name, kind):
    model, ids = lora_model(name, kind), batch(2, 8)
    model.train()
    mask = torch.ones_like(ids)
    before, loss, grads = asked(model, ids, mask)
    patch(model, "*:checkpointing")
    unknown, _, _ = asked(model, ids, mask)
    full_masks.note(mask)
    known, again, found = asked(model, ids, mask)
    assert (unknown, known) == (before, 0)
    # With windows in every layer, or eager attention, there is a mask anyway.
    assert before > 0 or kind in ("mistral", "ministral", "gemma2")
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[n], found[n]) for n in grads)
    mask[0, 0] = 0
    changed, other, _ = asked(model, ids, mask)
    assert changed >= before
    assert not torch.equal(other, loss)
    revert(model)


def test_other_attention_gets_a_plain_mask():
    mask = torch.ones(2, 8, dtype=torch.long)
    full_masks.note(mask)
    model = lora_model("llama", "llama").base_model.model.model
    for implementation, kind in (("sdpa", full_masks._Full), ("eager", torch.Tensor), ("flex_attention", torch.Tensor)):
        model.config._attn_implementation = implementation
        assert type(full_masks.answering(model, mask)) is kind
    assert full_masks.answering(model, None) is None


def test_tensors_of_inference_mode_are_left_alone():
    model = lora_model("llama", "llama").base_model.model.model
    with torch.inference_mode():
        mask = torch.ones(2, 8, dtype=torch.long)
    assert full_masks.answering(model, mask) is mask
    full_masks.note(mask)
    assert full_masks.answering(model, mask) is mask


def test_what_it_answers():
    mask = torch.ones(2, 8, dtype=torch.long).as_subclass(full_masks._Full)
    seen = mask.to(torch.bool)
    assert type(seen) is full_masks._Full
    assert seen.dtype is torch.bool
    assert seen.sum() == seen.numel()
    assert seen.all()
    assert torch.all(seen)
    for plain in (mask.sum(-1), mask[:, :4], ~seen, mask.sum(), mask + 1):
        assert type(plain) is torch.Tensor
    assert torch.equal(mask.sum(-1), torch.full((2,), 8))
    assert not (~seen).any()


def moved(batch, device):
    """As accelerate sends a batch, with a copy for a device."""
    return type(batch)({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()})


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_what_is_noted(kind):
    send = full_masks.looking(moved)
    ones, rows = torch.ones(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long)
    padded = ones.clone()
    padded[1, 5:] = 0
    for mask, is_noted in ((ones, True), (padded, False), (2 * ones, False), (torch.ones(2, 1, 8, 8), False)):
        sent = send(kind({"input_ids": rows, "attention_mask": mask}), "cuda")
        assert (sent["attention_mask"] in full_masks._known) is is_noted
        assert sent["input_ids"] not in full_masks._known
    assert send(kind({"input_ids": rows}), "cuda").keys() == {"input_ids"}
    assert full_masks.looking(lambda batch, device: batch)([rows], "cpu") == [rows]
    # Nothing was sent: it may be written where it lies.
    full_masks.looking(lambda batch, device: batch)({"attention_mask": ones}, "cpu")
    assert ones not in full_masks._known

"""Packed rows: what is read from upstream's masks, and that no document sees another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_models import assert_every_policy, batch, distance, fuse, gradients, lora_model

from sloth_plugins.patches.blocks import sdpa
from sloth_plugins.patches.blocks.documents import documents_of

# On a CPU, heads that share keys have no kernel for documents.
EVERY_HEAD = {"num_key_value_heads": 4, "head_dim": 16}


def positions_of(*lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


def mask_of(positions, window=None):
    """What transformers makes of positions."""
    number = (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
    at = torch.arange(positions.shape[1])
    distance = at[:, None] - at
    seen = (number[:, :, None] == number[:, None, :]) & (distance >= 0)
    return (seen if window is None else seen & (distance < window))[:, None]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=5), min_size=1, max_size=3),
    st.sampled_from([None, 1, 3, 50]),
    st.booleans(),
)
def test_documents_are_read_from_masks(rows, window, is_windowed):
    length = max(map(sum, rows))
    rows = [[*row, *([length - sum(row)] if sum(row) < length else [])] for row in rows]
    positions = torch.cat([positions_of(*row) for row in rows])
    mask = mask_of(positions, window if is_windowed else None)
    found = documents_of(mask, positions, len(rows), window)
    # A document of one token goes on into the next if that begins where it would have gone on.
    expected, base = [], 0
    for row, at in zip(rows, positions.tolist(), strict=True):
        expected += [base + i for i in range(length) if i == 0 or at[i] != at[i - 1] + 1]
        base += length
        assert sum(row) == length
    assert found.bounds == (*expected, base)
    assert found.on_device.tolist() == list(found.bounds)
    if found.window is not None:
        assert torch.equal(mask_of(positions, found.window), mask)
    else:
        assert torch.equal(mask_of(positions), mask)


def test_another_mask_is_upstreams():
    positions = positions_of(3, 4)
    mask = mask_of(positions)
    assert documents_of(mask, positions, 1, None) is not None
    for change in ((0, 0, 2, 0), (0, 0, 1, 2), (0, 0, 4, 1)):
        other = mask.clone()
        other[change] = ~other[change]
        assert documents_of(other, positions, 1, None) is None
    assert documents_of(mask_of(positions, 2), positions, 1, 3) is None
    assert documents_of(mask, positions[:, :6], 1, None) is None
    assert documents_of(mask.float(), positions, 1, None) is None
    assert documents_of(mask[..., :6], positions, 1, None) is None


def test_a_mask_that_was_changed_is_read_again():
    positions = positions_of(3, 4)
    mask = mask_of(positions)
    first = documents_of(mask, positions, 1, None)
    assert documents_of(mask, positions, 1, None) is first
    mask[0, 0, 2, 0] = False
    assert documents_of(mask, positions, 1, None) is None
    mask.copy_(mask_of(positions))
    assert documents_of(mask, positions, 1, None).bounds == first.bounds
    positions[0, 3:] = torch.arange(3, 7)
    assert documents_of(mask, positions, 1, None) is None


def test_a_mask_of_one_row_counts_for_all():
    mask = mask_of(positions_of(5))
    assert documents_of(mask, None, 3, None).bounds == (0, 5, 10, 15)


@pytest.fixture
def packed(monkeypatch):
    """Calls of the kernels for documents."""
    seen = []
    for name in ("_documents_forward", "_documents_backward"):
        original = getattr(sdpa, name)

        def counting(*args, name=name, original=original):
            seen.append(name)
            return original(*args)

        monkeypatch.setattr(sdpa, name, counting)
    return seen


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_packed_rows_give_stocks_gradients(kind, packed, runs):
    model = lora_model(kind, kind, changes=EVERY_HEAD)
    ids = batch(2, 12)
    positions = torch.cat([positions_of(5, 7), positions_of(1, 2, 9)])
    expected = gradients(model, ids, position_ids=positions)
    fuse(model)
    loss, found = gradients(model, ids, position_ids=positions)
    assert packed.count("_documents_forward") == packed.count("_documents_backward") == 2
    assert len(runs) == 2
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    assert distance(found, expected[1]) < 1e-5


def test_every_policy_takes_packed_rows(packed, runs):
    model = lora_model(changes=EVERY_HEAD)
    positions = torch.cat([positions_of(5, 8), positions_of(1, 2, 10)])
    given = model.forward
    model.forward = lambda *args, **kwargs: given(*args, **{**kwargs, "position_ids": positions})
    stock = gradients(model)
    assert_every_policy(model, runs, stock)
    assert packed


def test_documents_do_not_see_each_other(packed):
    model = lora_model(changes=EVERY_HEAD)
    fuse(model)
    first, second = batch(1, 5, seed=1), batch(1, 7, seed=2)
    together = model(input_ids=torch.cat([first, second], 1), position_ids=positions_of(5, 7)).logits
    assert packed
    torch.testing.assert_close(together[:, :5], model(input_ids=first).logits)
    torch.testing.assert_close(together[:, 5:], model(input_ids=second).logits)
    other = model(input_ids=torch.cat([batch(1, 5, seed=9), second], 1), position_ids=positions_of(5, 7)).logits
    assert torch.equal(other[:, 5:], together[:, 5:])


def test_windows_and_shared_heads_keep_upstreams_attention_here(packed, runs):
    for model in (lora_model(), lora_model("mistral", "mistral", changes=EVERY_HEAD)):
        ids, positions = batch(1, 24), positions_of(10, 14)
        expected = gradients(model, ids, position_ids=positions)[1]
        fuse(model)
        assert distance(gradients(model, ids, position_ids=positions)[1], expected) < 1e-5
    assert not packed
    assert len(runs) == 4

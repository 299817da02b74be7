"""Losses over labels of which nearly all count: every row is projected, and nobody waits for the device."""

import pytest
import torch
from tiny_llama import VOCABULARY, assert_same, ids, llama, patched

from sloth_plugins.patches.kernels import dispatch
from sloth_plugins.patches.losses import linear_log_probs
from sloth_plugins.patches.losses.labels import LabelCount
from sloth_plugins.patches.losses.linear_log_probs import linear_cross_entropy


def labels_with(ignored):
    """64 labels, of which the first `ignored` do not count."""
    made = ids(2, 32).clone()
    made.view(-1)[:ignored] = -100
    return made


@pytest.mark.parametrize(("ignored", "dense"), [(0, True), (2, True), (3, False), (64, False)])
def test_when_all_rows_are_taken(ignored, dense):
    assert LabelCount.of(labels_with(ignored)).nearly_all_of(VOCABULARY) is dense


@pytest.mark.parametrize("strange", [-1, VOCABULARY])
def test_labels_outside_the_vocabulary_are_an_error_still(model, strange):
    labels = labels_with(0)
    labels[1, 7] = strange
    assert not LabelCount.of(labels).nearly_all_of(VOCABULARY)
    with pytest.raises(IndexError, match=f"target {strange} is out of bounds"):
        patched(model)(ids(2, 32), labels=labels)


@pytest.mark.parametrize("labels", [None, [1, 2], torch.zeros(0, dtype=torch.int64), torch.zeros(3), "labels"])
def test_what_cannot_be_counted(labels):
    assert LabelCount.of(labels) is None


@pytest.mark.parametrize("items", [None, 50])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_models_loss_and_gradients(monkeypatch, trained, items):
    monkeypatch.setattr(linear_log_probs, "select_rows", None)  # not called
    model = llama()
    model.lm_head.weight.requires_grad_(trained)
    labels = labels_with(1)
    assert_same(model, lambda model: model(ids(2, 32), labels=labels, num_items_in_batch=items).loss)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_an_ignored_row_adds_nothing(trained, reduction, smoothing):
    """Not even where its hidden states are NaN, as those of padding may be."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 16), torch.randn(VOCABULARY, 16)
    targets = labels_with(2).view(-1)
    targets[0], targets[40] = 5, -100
    hidden[[1, 40]] = float("nan") if not trained else 0.0
    kept = targets != -100

    def run(function, *tensors):
        leaves = [tensor.detach().clone() for tensor in tensors]
        leaves[0].requires_grad_()
        leaves[1].requires_grad_(trained)
        loss = function(*leaves)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]

    options = {"reduction": reduction, "label_smoothing": smoothing}
    expected = run(
        lambda h, w: torch.nn.functional.cross_entropy(h[kept] @ w.t(), targets[kept], **options), hidden, weight
    )
    dense = LabelCount.of(targets)
    assert dense.nearly_all_of(VOCABULARY)
    options["smoothing"] = options.pop("label_smoothing")
    found = run(lambda h, w: linear_cross_entropy(h, w, None, targets, labels=dense, **options), hidden, weight)
    assert (found[1][~kept] == 0).all()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_target_that_was_no_label_is_never_a_wrong_number():
    hidden, weight = torch.randn(64, 16), torch.randn(VOCABULARY, 16)
    targets = labels_with(0).view(-1)
    count = LabelCount.of(targets)
    assert linear_cross_entropy(hidden, weight, None, torch.full_like(targets, -100), labels=count).isnan()
    outside = targets + VOCABULARY
    if dispatch.backend_for(hidden) == "triton":
        assert linear_cross_entropy(hidden, weight, None, outside, labels=count).isnan()
    else:
        with pytest.raises(RuntimeError, match="index"):
            linear_cross_entropy(hidden, weight, None, outside, labels=count)

"""Logits that nobody has computed behave as upstream's do, whatever is done with them."""

import copy
import io
import logging
import pickle

import numpy
import pytest
import torch
from tiny_llama import VOCABULARY, assert_same, deferred, ids, labels, llama, patched
from torch import nn
from torch.nn import functional as F

from sloth_plugins.patches.kernels import notices
from sloth_plugins.patches.losses.deferred import DeferredLogits
from sloth_plugins.patches.losses.recipe import StaleLogitsError

MASK = torch.tensor([[True, False] * 5 + [True]] * 3)

STAY_DEFERRED = {
    "row": lambda x: x[0],
    "last token": lambda x: x[:, -1],
    "shift": lambda x: x[..., :-1, :],
    "mask": lambda x: x[MASK],
    "new axis": lambda x: x[None],
    "explicit slices": lambda x: x[1:2, :, :],
    "index tensor": lambda x: x[:, torch.tensor([1, 2])],
    "list": lambda x: x[[0, 2]],
    "view": lambda x: x.view(-1, VOCABULARY),
    "view, inferred vocabulary": lambda x: x.reshape(33, -1),
    "view, inferred rows": lambda x: x.view(3, -1, VOCABULARY),
    "flatten": lambda x: x.flatten(0, 1),
    "contiguous shift": lambda x: x[..., :-1, :].contiguous().view(-1, VOCABULARY),
    "double": lambda x: x.double(),
    "to dtype": lambda x: x.to(torch.float16),
    "to device": lambda x: x.to("cpu"),
    "to device and dtype": lambda x: x.to("cpu", torch.float64),
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "chunk": lambda x: x.chunk(2)[1],
    "split": lambda x: x.split([1, 2])[1],
    "split of the sequence": lambda x: x.split(4, 1)[2],
    "unbind": lambda x: x.unbind(1)[3],
    "iteration": lambda x: list(x)[2],
    "temperature": lambda x: x / 0.7,
    "scale": lambda x: 2 * x,
    "softcap": lambda x: 30.0 * torch.tanh(x / 30.0),
    "negation": lambda x: -x,
    "log_softmax": lambda x: x.log_softmax(-1),
}
REDUCE = {
    "argmax": lambda x: x.argmax(-1),
    "argmax, kept": lambda x: x.argmax(dim=2, keepdim=True),
    "max": lambda x: x.max(-1).values,
    "max indices": lambda x: torch.max(x, dim=-1, keepdim=True).indices,
    "logsumexp": lambda x: torch.logsumexp(x, dim=-1),
    "sum": lambda x: x.sum(-1),
    "sum in a dtype": lambda x: x.sum(dim=-1, keepdim=True, dtype=torch.float64),
    "mean": lambda x: x.mean(-1),
    "mean of all": lambda x: x.mean(),
    "mean of scaled": lambda x: (x / 3).mean(-1, keepdim=True),
    "topk": lambda x: x.topk(3).values,
    "topk indices": lambda x: x.topk(3, dim=-1).indices,
    "gather": lambda x: x.gather(-1, ids()[..., None]),
    "gather several": lambda x: torch.gather(x, -1, torch.stack([ids(), ids(seed=2)], -1)),
    "log-probabilities": lambda x: x.log_softmax(-1).gather(-1, ids()[..., None]).squeeze(-1),
    "negated log-probabilities": lambda x: (-F.log_softmax(x / 2, dim=-1)).gather(-1, ids()[..., None]),
    "take_along_dim": lambda x: torch.take_along_dim(x.log_softmax(dim=-1), ids().unsqueeze(-1), dim=2),
}
READ = {
    "a column": lambda x: x[..., 5],
    "a number": lambda x: x[0, 0, 0],
    "part of the vocabulary": lambda x: x[:, :, 3:9],
    "axis after": lambda x: x[..., None],
    "mask of all": lambda x: x[x > 0],
    "flat": lambda x: x.flatten(),
    "argmax of all": lambda x: x.argmax(),
    "max of all": lambda x: x.max(),
    "softmax": lambda x: x.softmax(-1),
    "transpose": lambda x: x.transpose(0, 1),
    "cat": lambda x: torch.cat([x, x]),
    "stack of rows": lambda x: torch.stack([x[0], x[1]]),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "new_zeros": lambda x: x.new_zeros(2),
    "a copy": lambda x: x.to(torch.float32, copy=True),
    "other views": lambda x: x.permute(2, 0, 1).reshape(-1),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "deepcopy": lambda x: copy.deepcopy(x.detach()),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "asarray": lambda x: torch.from_numpy(numpy.asarray(x.detach())),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "class weights": lambda x: F.cross_entropy(x.view(-1, VOCABULARY), ids().view(-1), weight=torch.arange(97.0)),
    "probabilities as targets": lambda x: F.cross_entropy(x[:, 0], torch.full((3, VOCABULARY), 1 / VOCABULARY)),
    "classes in the second dimension": lambda x: F.cross_entropy(x.transpose(1, 2), ids()),
}


@pytest.mark.parametrize("name", STAY_DEFERRED)
def test_form_changes_without_logits(model, name):
    found = STAY_DEFERRED[name](deferred(model))
    assert isinstance(found, DeferredLogits)
    assert found.pending
    expected = STAY_DEFERRED[name](model(ids()).logits)
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    assert found.requires_grad == expected.requires_grad
    torch.testing.assert_close(found + 0, expected)


@pytest.mark.parametrize("name", REDUCE)
def test_reductions_need_no_logits(model, name, monkeypatch):
    monkeypatch.setattr("sloth_plugins.patches.losses.rowwise.CHUNK_BYTES", 4 * VOCABULARY * 5)
    logits = deferred(model)
    found = REDUCE[name](logits)
    assert logits.pending
    assert type(found) is torch.Tensor
    expected = REDUCE[name](model(ids()).logits)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", READ)
def test_anything_else_reads_them(model, name):
    found = READ[name](deferred(model))
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, READ[name](model(ids()).logits))


DIFFERENTIATED = [name for name in REDUCE if "indices" not in name and "argmax" not in name]


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_reductions_are_differentiable(model, name, monkeypatch):
    monkeypatch.setattr("sloth_plugins.patches.losses.rowwise.CHUNK_BYTES", 4 * VOCABULARY * 5)
    weights = torch.linspace(-1, 1, REDUCE[name](model(ids()).logits).numel())
    assert_same(model, lambda lm: (REDUCE[name](lm(ids()).logits).flatten() * weights).sum(), rtol=2e-5)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in READ
        if name not in ("pickle", "deepcopy", "numpy", "asarray", "tolist", "new_zeros", "argmax of all")
    ],
)
def test_what_is_read_is_differentiable(model, name):
    weights = torch.linspace(-1, 1, READ[name](model(ids()).logits).numel())
    assert_same(model, lambda lm: (READ[name](lm(ids()).logits).flatten() * weights).sum(), rtol=2e-5)


def test_form_is_known_without_logits(model):
    logits = deferred(model)
    assert logits.shape == (3, 11, VOCABULARY) == logits.size()
    assert (len(logits), logits.dim(), logits.numel()) == (3, 3, 33 * VOCABULARY)
    assert (logits.requires_grad, logits.is_leaf, logits.is_contiguous()) == (True, False, True)
    assert isinstance(logits, torch.Tensor)
    assert hash(logits) == id(logits)
    assert logits.pending


def test_read_logits_are_upstreams_to_the_bit(model):
    assert torch.equal(deferred(model).detach() + 0, model(ids()).logits.detach())


def test_reading_twice_computes_once(model, monkeypatch):
    logits = deferred(model)
    first = logits.read("a test")
    monkeypatch.setattr(type(logits.recipe), "compute", None)
    assert logits.read("a test") is first


def test_reading_is_said_once(model, caplog, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    with caplog.at_level(logging.WARNING, "sloth_plugins"):
        deferred(model).softmax(-1)
        deferred(model).exp()
    assert [record.getMessage() for record in caplog.records] == [
        "sloth-plugins: cross_entropy: logits were read (by softmax) and therefore computed"
    ]


def written_through_a_slice(lm):
    logits = lm(ids()).logits
    shifted = logits[:, :-1]
    shifted.mul_(2.0)
    shifted /= 3.0
    return F.cross_entropy(logits.view(-1, VOCABULARY), ids().view(-1))


def written_after_a_slice(lm):
    logits = lm(ids()).logits
    shifted = logits[:, :-1]
    logits[:, :, 5] = -1e4
    return F.cross_entropy(shifted.reshape(-1, VOCABULARY), ids()[:, 1:].reshape(-1))


def written_to_the_last_token(lm):
    logits = lm(ids()).logits
    last = logits[:, -1]
    last.sum()
    last[:, 3] = 7.0
    return logits.pow(2).mean() + last.mean()


def copied_before_it_is_written(lm):
    logits = lm(ids()).logits
    wide = logits.double()
    logits.zero_()
    return wide.logsumexp(-1).sum().float() + logits.sum()


@pytest.mark.parametrize(
    "loss_of",
    [written_through_a_slice, written_after_a_slice, written_to_the_last_token, copied_before_it_is_written],
)
def test_writing_in_place_is_seen_as_upstream_has_it(model, loss_of):
    assert_same(model, loss_of, rtol=2e-5)


class Squares(torch.autograd.Function):
    """What a user's own function does with logits, out of sight of torch functions."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return (logits.detach() ** 2).sum()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def test_a_function_of_the_users_own_differentiates_them(model):
    assert_same(model, lambda lm: Squares.apply(lm(ids()).logits[:, :-1]), rtol=2e-5)


def test_dispatch_below_autograd_sees_the_values(model):
    logits = deferred(model).detach()
    out = torch.empty(logits.shape)
    with torch._C.DisableTorchFunctionSubclass():
        out.copy_(logits)
    assert torch.equal(out, model(ids()).logits)


def test_they_are_saved_as_a_plain_tensor(model):
    buffer = io.BytesIO()
    torch.save(deferred(model).detach(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, model(ids()).logits)


def test_logits_of_changed_weights_are_refused(model):
    logits = deferred(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    with pytest.raises(StaleLogitsError, match=r"can no longer be computed.*-\*:cross_entropy"):
        logits.exp()
    with pytest.raises(StaleLogitsError):
        F.cross_entropy(logits.view(-1, VOCABULARY), ids().view(-1))


def test_autocast_is_that_of_the_forward(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = patched(model)(ids()).logits
        expected = model(ids()).logits
        assert logits.dtype is torch.bfloat16
        assert logits.log_softmax(-1).dtype is expected.log_softmax(-1).dtype
    assert torch.equal(logits + 0, expected)


def test_no_graph_without_grad(model):
    with torch.no_grad():
        logits = patched(model)(ids()).logits
    assert logits.pending
    assert not logits.requires_grad
    assert torch.equal(logits + 0, model(ids()).logits)


LOSSES = {
    "labels": lambda lm: lm(ids(), labels=labels()).loss,
    "num_items_in_batch": lambda lm: lm(ids(), labels=labels(), num_items_in_batch=torch.tensor(17)).loss,
    "shift_labels": lambda lm: lm(ids(), labels=labels(), shift_labels=labels().roll(-1, 1)).loss,
    "by hand": lambda lm: F.cross_entropy(lm(ids()).logits[:, :-1].reshape(-1, 97), labels()[:, 1:].reshape(-1)),
    "module": lambda lm: nn.CrossEntropyLoss()(lm(ids()).logits.view(-1, 97).float(), labels().view(-1)),
    "smoothed": lambda lm: F.cross_entropy(lm(ids()).logits.flatten(0, 1), labels().view(-1), label_smoothing=0.1),
    "summed": lambda lm: F.cross_entropy(lm(ids()).logits.flatten(0, 1), labels().view(-1), reduction="sum") / 9,
    "each": lambda lm: (
        F.cross_entropy(lm(ids()).logits.flatten(0, 1), labels().view(-1), reduction="none").pow(2).sum()
    ),
    "other ignored index": lambda lm: F.cross_entropy(
        lm(ids()).logits.flatten(0, 1), ids().view(-1), ignore_index=int(ids()[0, 0])
    ),
    "softcap": lambda lm: F.cross_entropy(5 * torch.tanh(lm(ids()).logits.flatten(0, 1) / 5), labels().view(-1)),
    "two of them": lambda lm: (
        F.cross_entropy(lm(ids()).logits[0], ids()[0])
        + lm(ids()).logits.log_softmax(-1).gather(-1, ids()[..., None]).mean()
    ),
    "nll": lambda lm: F.nll_loss(F.log_softmax(lm(ids()).logits.view(-1, 97), -1), labels().view(-1)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("head", ["trained", "frozen", "tied"])
def test_losses_are_upstreams(name, head):
    model = llama(tie_word_embeddings=head == "tied")
    if head == "frozen":
        model.lm_head.requires_grad_(False)
    assert_same(model, LOSSES[name])


def test_the_trainers_label_smoother_is_upstreams(model):
    from transformers.trainer_pt_utils import LabelSmoother

    smoother = LabelSmoother(epsilon=0.1)
    assert_same(model, lambda lm: smoother(lm(ids()), labels(), shift_labels=True))


def test_the_loss_leaves_logits_alone(model):
    out = patched(model)(ids(), labels=labels())
    out.loss.backward()
    assert out.logits.pending


def test_labels_out_of_range_are_refused(model):
    wrong = ids()
    wrong[1, 3] = 500
    with pytest.raises(IndexError, match="500"):
        patched(model)(ids(), labels=wrong)


def test_all_labels_ignored_is_upstreams(model):
    nothing = torch.full((3, 11), -100)
    assert torch.isnan(patched(model)(ids(), labels=nothing).loss)
    assert torch.isnan(model(ids(), labels=nothing).loss)
    count = torch.tensor(1)
    assert_same(model, lambda lm: lm(ids(), labels=nothing, num_items_in_batch=count).loss)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinite_logits_are_upstreams(model, value):
    with torch.no_grad():
        model.lm_head.weight[7] = 0
        model.lm_head.weight[7, 0] = value
    found, expected = (lm(ids(), labels=labels()).loss for lm in (patched(model), model))
    torch.testing.assert_close(found, expected, equal_nan=True)

"""TRL's functions of logits, on logits that nobody has computed: the same values and gradients, and no logits."""

import pytest
import torch
from tiny_llama import VOCABULARY, assert_same, ids, labels, llama, patched
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.gold.gold_trainer import GOLDTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.experimental.sdft import loss_utils, sdft_trainer
from trl.trainer import utils

from sloth_plugins.patches.losses.deferred import DeferredLogits
from sloth_plugins.patches.trainers import distillation, log_probs, preference
from sloth_plugins.patches.trainers.scope import deferred_logits, replaced

ROW_MASK = (labels() != -100).long()


@pytest.fixture
def unread(monkeypatch):
    """Nothing but chunks may be computed."""

    def refuse(self, reader):
        raise AssertionError(f"logits were read by {reader}")

    monkeypatch.setattr(DeferredLogits, "read", refuse)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("row_mask", [None, ROW_MASK, ROW_MASK.bool()])
def test_selective_log_softmax(model, unread, temperature, row_mask):
    function = log_probs.selective_log_softmax(utils.selective_log_softmax)
    weights = torch.linspace(-1, 1, 33).view(3, 11)
    assert_same(
        model,
        lambda lm: (function(lm(ids()).logits, ids(), temperature=temperature, row_mask=row_mask) * weights).sum(),
        rtol=2e-5,
    )


@pytest.mark.parametrize("entropy_requires_grad", [True, False])
def test_selective_log_softmax_and_entropy(model, unread, entropy_requires_grad):
    function = log_probs.selective_log_softmax_and_entropy(utils.selective_log_softmax_and_entropy)

    def loss_of(lm):
        chosen, entropy = function(
            lm(ids()).logits, ids(), entropy_requires_grad=entropy_requires_grad, row_mask=ROW_MASK
        )
        assert entropy.requires_grad == entropy_requires_grad
        return (chosen * torch.linspace(-1, 1, 33).view(3, 11)).sum() + entropy.pow(2).sum()

    assert_same(model, loss_of, rtol=2e-5)


def test_several_targets_of_one_position_are_left_to_trl(model):
    function = log_probs.selective_log_softmax(utils.selective_log_softmax)
    several = torch.stack([ids(), ids(seed=2)], -1)
    assert_same(model, lambda lm: function(lm(ids()).logits, several).sum(), rtol=2e-5)


@pytest.mark.parametrize("trainer", [ORPOTrainer, CPOTrainer])
@pytest.mark.parametrize("average_log_prob", [True, False])
def test_get_batch_logps(model, unread, trainer, average_log_prob):
    function = preference.odds_ratio(trainer)["get_batch_logps"].__func__

    def loss_of(lm):
        return (function(lm(ids()).logits, labels(), average_log_prob) * torch.tensor([1.0, -2.0, 3.0])).sum()

    assert_same(model, loss_of, rtol=2e-5)


def test_get_batch_logps_of_an_empty_completion_is_trls(model):
    function = preference.odds_ratio(ORPOTrainer)["get_batch_logps"].__func__
    empty = labels()
    empty[1] = -100
    found, expected = (function(lm(ids()).logits, empty.clone(), True) for lm in (patched(model), model))
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert torch.isnan(expected[1])


REDUCTIONS = {
    "batchmean": {},
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
    "counted": {"num_items_in_batch": torch.tensor(13)},
}


@pytest.mark.parametrize("trainer", [GKDTrainer, GOLDTrainer])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("given_labels", [True, False])
@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_generalized_jsd(model, unread, monkeypatch, trainer, reduction, given_labels, beta):
    monkeypatch.setattr("sloth_plugins.patches.losses.rowwise.CHUNK_BYTES", 4 * VOCABULARY * 2 * 5)
    function = distillation.generalized_jsd(trainer)["generalized_jsd_loss"].__func__
    teacher = llama(seed=5)

    def loss_of(lm):
        stock = type(lm) is type(teacher)
        with torch.no_grad():
            teachers = (teacher if stock else patched(teacher))(ids()).logits
        options = {"beta": beta, "temperature": 0.8, **REDUCTIONS[reduction]}
        target = labels()[:, 1:] if given_labels else None
        return function(lm(ids()).logits[:, :-1], teachers[:, :-1], labels=target, **options)

    assert_same(model, loss_of, rtol=2e-5)


def test_generalized_jsd_without_a_label(model):
    function = distillation.generalized_jsd(GKDTrainer)["generalized_jsd_loss"].__func__
    nothing = torch.full_like(ids(), -100)
    assert_same(model, lambda lm: function(lm(ids()).logits, lm(ids(seed=4)).logits, labels=nothing))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mode", ["full", "topk", "topk with tail", "sampled"])
def test_self_distillation(model, monkeypatch, alpha, mode):
    if mode == "sampled" and alpha != 1.0:
        pytest.skip("TRL takes alpha 1 only")
    monkeypatch.setattr("sloth_plugins.patches.losses.rowwise.CHUNK_BYTES", 4 * VOCABULARY * 2 * 5)
    teacher = llama(seed=5)
    each = distillation._each_row
    selective = log_probs.selective_log_softmax(loss_utils.selective_log_softmax)

    def loss_of(lm):
        stock = type(lm) is type(teacher)
        with torch.no_grad():
            teachers = (teacher if stock else patched(teacher))(ids()).logits / 0.9
        students = lm(ids()).logits / 0.9
        if mode == "full":
            function = each(sdft_trainer.compute_full_logit_self_distillation_loss)
            return function(students, teachers, distillation_alpha=alpha).sum()
        if mode == "sampled":
            with replaced(loss_utils, {"selective_log_softmax": selective}):
                function = sdft_trainer.compute_sampled_token_self_distillation_loss
                return function(students, teachers, ids(), distillation_alpha=alpha).sum()
        function = each(sdft_trainer.compute_topk_self_distillation_loss)
        options = {"distillation_topk": 7, "distillation_add_tail": mode.endswith("tail")}
        return function(students, teachers, distillation_alpha=alpha, **options).sum()

    assert_same(model, loss_of, rtol=5e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "outputs", [("log_probs",), ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")]
)
def test_the_function_of_trls_fused_head(softcap, bias, outputs):
    made = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=made) for shape in ((13, 32), (VOCABULARY, 32), (VOCABULARY,))]
    targets = torch.randint(0, VOCABULARY, (13,), generator=made)
    found = []
    for function in (log_probs.FusedLogProbs(utils._ChunkedLogProbFunction), utils._ChunkedLogProbFunction):
        hidden, weight, shift = (tensor.clone().requires_grad_() for tensor in inputs)
        results = function.apply(hidden, weight, shift if bias else None, targets, 0.7, 64, softcap, 1.3, outputs)
        loss = results[0].pow(2).sum() + (results[1].pow(2).sum() if results[1] is not None else 0)
        loss.backward()
        found.append([*results, hidden.grad, weight.grad, shift.grad])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            size = float(theirs.detach().float().abs().max())
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-5 * size + 1e-6)


def test_a_sharded_head_is_left_to_trl():
    calls = []

    class Original:
        @staticmethod
        def apply(*args):
            calls.append(args)
            return "theirs"

    weight = torch.nn.Parameter(torch.randn(VOCABULARY, 32))
    weight.ds_id = 0
    inputs = (torch.randn(5, 32), weight, None, torch.zeros(5, dtype=torch.int64), 1.0, 64)
    assert log_probs.FusedLogProbs(Original).apply(*inputs) == "theirs"
    assert len(calls) == 1


def test_heads_inside_wrappers_are_found(model):
    from peft import LoraConfig, get_peft_model

    wrapped = torch.nn.Module()
    wrapped.module = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    wrapped.forward = wrapped.module.forward
    with deferred_logits(wrapped, None):
        logits = wrapped(ids()).logits
        assert isinstance(logits, DeferredLogits)
    assert type(wrapped(ids()).logits) is torch.Tensor


def test_globals_are_put_back_after_an_error():
    before = loss_utils.selective_log_softmax

    def fail_inside():
        with replaced(loss_utils, {"selective_log_softmax": None, "not_there": 1}):
            assert loss_utils.selective_log_softmax is None
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert loss_utils.selective_log_softmax is before
    assert not hasattr(loss_utils, "not_there")

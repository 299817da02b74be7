"""When a model computes its logits after all, and what it says then."""

import pytest
import torch
from tiny_llama import deferred, ids, labels, llama, loss_and_gradients, patched

from sloth_plugins.patches.kernels import notices
from sloth_plugins.patches.losses.deferral import obstacle
from sloth_plugins.patches.losses.deferred import DeferredLogits


@pytest.fixture
def said(monkeypatch):
    """What was said to the user."""
    monkeypatch.setattr(notices, "_said", set())
    return notices._said


def with_hook(model):
    model.lm_head.register_forward_hook(lambda *args: None)


def with_lora_on_the_head(model):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["lm_head"], r=2), model)


def with_another_class(model):
    class Head(torch.nn.Linear):
        pass

    model.lm_head.__class__ = Head


def with_another_forward(model):
    model.lm_head.forward = lambda rows: torch.nn.functional.linear(rows, model.lm_head.weight)


def with_parametrization(model):
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)


def with_a_shard(model):
    model.lm_head.weight.ds_id = 3


def with_an_empty_shard(model):
    model.lm_head.weight.data = model.lm_head.weight.data.new_empty(0)


OBSTACLES = {
    "hooks": with_hook,
    "peft.tuners.lora": with_lora_on_the_head,
    "Head, not a plain": with_another_class,
    "forward was replaced": with_another_forward,
    "Parametrized": with_parametrization,
    "sharded, or no plain": with_a_shard,
    "sharded or quantised": with_an_empty_shard,
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_a_head_that_is_not_plain_is_refused(model, reason):
    OBSTACLES[reason](model)
    assert reason in obstacle(model, model.get_output_embeddings())


@pytest.mark.parametrize("reason", [reason for reason in OBSTACLES if "shard" not in reason])
def test_upstreams_path_is_taken_and_said(model, said, reason):
    OBSTACLES[reason](model)
    expected = loss_and_gradients(model, lambda lm: lm(ids(), labels=labels()).loss)
    found = loss_and_gradients(patched(model), lambda lm: lm(ids(), labels=labels()).loss)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())
    assert [line for line in said if reason in line]


def test_a_plain_head_has_no_obstacle(model):
    assert obstacle(model, model.lm_head) is None


def test_few_logits_that_were_asked_for_are_computed(model):
    lm = patched(model)
    assert type(lm(ids(), logits_to_keep=1).logits) is torch.Tensor
    assert type(lm(ids(), logits_to_keep=torch.tensor([0, 3])).logits) is torch.Tensor


def test_generation_is_upstreams(model):
    for options in ({}, {"use_cache": False}, {"num_beams": 2}):
        generate = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
        assert torch.equal(patched(model).generate(ids()[:2], **generate), model.generate(ids()[:2], **generate))


def test_the_head_is_as_before_after_the_forward(model):
    before = dict(vars(model.lm_head))
    deferred(model)
    assert vars(model.lm_head) == before
    with pytest.raises(ValueError, match="exactly one"):
        patched(model)(ids(), inputs_embeds=torch.zeros(3, 11, 32))
    assert vars(model.lm_head) == before


def test_the_hooks_of_a_device_map_stay(model):
    from accelerate.hooks import attach_execution_device_hook

    expected = loss_and_gradients(model, lambda lm: lm(ids(), labels=labels()).loss)
    attach_execution_device_hook(model.lm_head, torch.device("cpu"))
    before = dict(vars(model.lm_head))
    assert obstacle(model, model.lm_head) is None
    assert deferred(model).pending
    assert vars(model.lm_head) == before
    found = loss_and_gradients(patched(model), lambda lm: lm(ids(), labels=labels()).loss)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_an_offloaded_head_is_refused(model):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu", offload=True, weights_map={}))
    assert "hooks" in obstacle(model, model.lm_head)


def test_inference_mode_computes_them(model):
    with torch.inference_mode():
        logits = patched(model)(ids()).logits
        assert type(logits) is torch.Tensor
        assert torch.equal(logits, model(ids()).logits)


def test_a_compiled_model_computes_them(model):
    compiled = torch.compile(patched(model), backend="eager")
    logits = compiled(ids()).logits
    assert not isinstance(logits, DeferredLogits)


def test_outputs_go_through_accelerates_wrapper(model):
    from accelerate.utils.operations import convert_outputs_to_fp32

    lm = patched(model.to(torch.bfloat16))
    logits = convert_outputs_to_fp32(lm.forward)(ids()).logits
    assert isinstance(logits, DeferredLogits)
    assert logits.pending
    assert logits.dtype is torch.float32


def test_weights_of_another_dtype(model):
    lm = llama(dtype=torch.float16)
    found, expected = (which(ids(), labels=labels()).loss for which in (patched(lm), lm))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)

"""What torch promises of backwards holds for fused layers: repetition, accumulation, subsets, hooks, no leaks."""

import copy
import gc
import io
import pickle

import pytest
import torch
from live_bytes import LiveBytes
from lora_models import batch, distance, fuse, gradients, lora_model
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sloth_plugins import revert
from sloth_plugins.patches.blocks import attention_block, mlp_block
from sloth_plugins.patches.blocks.policy import Policy, choosing

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("runs")]
MASK = torch.tensor([[0] * 4 + [1] * 9, [1] * 13])
# With a mask the attention keeps a graph of its own.
MASKED = pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "masked"])
# On the CPU torch's kernel is called directly only where no heads share keys.
OWN_KEYS = {"num_key_value_heads": 4, "head_dim": 16}
FAMILIES = {
    "llama": {},
    "own keys": {"changes": OWN_KEYS},
    "own keys, normed": {"architecture": "qwen3", "kind": "qwen3", "changes": OWN_KEYS},
    "fused projections": {"architecture": "phi3", "kind": "phi3"},
    "parallel": {"architecture": "phi", "kind": "phi"},
    "four norms": {"architecture": "gemma3", "kind": "gemma3_text"},
}
FAMILY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True, params=list(Policy))
def policy(request):
    with choosing(lambda *_: request.param):
        yield request.param


def fused(family="llama", **config):
    model = lora_model(**FAMILIES[family], **config)
    fuse(model)
    return model


def loss_of(model, mask=None, seed=3):
    ids = batch(seed=seed)
    return model(input_ids=ids, labels=ids, attention_mask=mask).loss


def taken(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@FAMILY
@MASKED
def test_twice_with_a_retained_graph(mask, family):
    model = fused(family)
    expected = gradients(model, attention_mask=mask)[1]
    model.zero_grad()
    loss = loss_of(model, mask)
    for retain in (True, True, False):
        loss.backward(retain_graph=retain)
        assert_same(taken(model), expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_differentiating_twice_is_refused():
    model = fused()
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss_of(model), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        sum(grad.square().sum() for grad in grads).backward()


@MASKED
def test_accumulation(mask):
    stock = lora_model()
    for seed in (3, 4):
        loss_of(stock, mask, seed).backward()
    expected = taken(stock)
    model = fused()
    for seed in (3, 4):
        loss_of(model, mask, seed).backward()
    assert distance(taken(model), expected) < 1e-5
    # Both forwards first, then one backward through both.
    (loss_of(model, mask, 3) + loss_of(model, mask, 4)).backward()
    assert distance(taken(model), expected) < 1e-5
    # And in the other order.
    first, second = loss_of(model, mask, 3), loss_of(model, mask, 4)
    first.backward()
    second.backward()
    assert distance(taken(model), expected) < 1e-5


@FAMILY
@pytest.mark.parametrize("part", ["layers.0", "layers.1", "q_proj.lora_A", "lora_B", "mlp", "self_attn"])
def test_only_some_gradients(part, family):
    model = fused(family)
    expected = gradients(model)[1]
    model.zero_grad()
    wanted = [name for name in expected if part in name] or [name for name in expected if "down" in name]
    parameters = dict(model.named_parameters())
    loss = loss_of(model)
    # A first backward that reaches only part of the graph must leave the rest of it as it was.
    for _ in range(2):
        grads = torch.autograd.grad(loss, [parameters[name] for name in wanted], retain_graph=True)
        assert_same(dict(zip(wanted, grads, strict=True)), {name: expected[name] for name in wanted})
    loss.backward()
    assert_same(taken(model), expected)


@MASKED
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_by_the_user(use_reentrant, mask):
    model = fused()
    model.enable_input_require_grads()
    expected = gradients(model, attention_mask=mask)[1]
    for layer in model.base_model.model.model.layers:
        call = layer.forward
        layer.forward = lambda x, call=call, **kwargs: checkpoint(
            lambda x: call(x, **kwargs), x, use_reentrant=use_reentrant
        )
    model.zero_grad()
    loss_of(model, mask).backward()
    assert_same(taken(model), expected)


@MASKED
def test_saved_tensors_hooks(mask):
    model = fused()
    expected = gradients(model, attention_mask=mask)[1]
    model.zero_grad()
    with save_on_cpu():
        loss_of(model, mask).backward()
    assert_same(taken(model), expected)
    packed = []
    with saved_tensors_hooks(lambda t: (packed.append(t), t.clone())[1], lambda t: t):
        loss = loss_of(model, mask)
    before = [t.clone() for t in packed]
    loss.backward()
    assert_same(taken(model), expected)
    assert all(torch.equal(*pair) for pair in zip(packed, before, strict=True)), "written to what somebody else holds"


def test_a_parameter_that_changes_in_between_is_noticed():
    model = fused()
    loss = loss_of(model)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_and_pickles():
    model = lora_model()
    keys, expected = list(model.state_dict()), gradients(model)[1]
    fuse(model)
    gradients(model)
    model.zero_grad()
    assert list(model.state_dict()) == keys
    duplicate = copy.deepcopy(model)
    assert list(duplicate.state_dict()) == keys
    assert distance(gradients(duplicate)[1], expected) < 1e-5
    with torch.no_grad():
        duplicate.base_model.model.model.layers[0].mlp.down_proj.lora_A["default"].weight.zero_()
    assert distance(gradients(model)[1], expected) < 1e-5, "a copy has parameters of its own"
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded.base_model.model.model.layers[0]).__mro__[1].__name__ != "LlamaDecoderLayer"
    assert distance(gradients(loaded)[1], expected) < 1e-5
    buffer = io.BytesIO()
    torch.save(model, buffer)
    revert(model)
    assert distance(gradients(model)[1], expected) < 1e-5


def held_by(memory):
    """Bytes that live after any operation, which is when they are counted anew."""
    torch.empty(0)
    return memory.living()


@MASKED
def test_nothing_is_left_after_the_backward(mask, runs):
    model = fused()
    loss_of(model, mask).backward()
    runs.clear()
    gc.collect()
    gc.disable()
    try:
        with LiveBytes() as memory:
            loss = loss_of(model, mask)
            runs.clear()
            loss.backward()
            del loss
            model.zero_grad()
            left = held_by(memory)
    finally:
        gc.enable()
    assert left < 4096, f"{left} bytes are still held, without a collection of cycles"


@MASKED
def test_a_loss_that_is_kept_holds_no_activations(mask, runs):
    """Whoever collects losses holds their graphs; after the backward these must be empty shells."""
    model = fused()
    loss_of(model, mask).backward()
    held = []
    with LiveBytes() as memory:
        for _ in range(2):
            loss = loss_of(model, mask)
            runs.clear()
            loss.backward()
            model.zero_grad()
            held.append(loss)
        left = held_by(memory)
    # An output of one block alone has 2 * 13 * 48 * 4 bytes.
    assert left < 2 * 13 * 48 * 4, f"{left} bytes are held by two losses"


def test_gradients_go_down_in_one_place(policy, monkeypatch):
    """From one block to the next nothing is allocated, unless somebody else sees the gradient."""
    model = fused()
    places = []
    for module in (attention_block, mlp_block):
        whole = module.norm_rows_backward

        def recorded(*args, whole=whole, dx=None, residual_grad=None, **kwargs):
            places.append((residual_grad.data_ptr(), dx.data_ptr()))
            whole(*args, dx=dx, residual_grad=residual_grad, **kwargs)

        monkeypatch.setattr(module, "norm_rows_backward", recorded)
    model.enable_input_require_grads()
    loss_of(model).backward()
    plain = taken(model)
    assert len(places) == 4
    assert len({place for pair in places for place in pair}) == 1
    seen = []

    def watch(module, args):
        args[0].register_hook(lambda grad: seen.append((grad, grad.clone())))

    handle = model.base_model.model.model.norm.register_forward_pre_hook(watch)
    loss_of(model).backward()
    handle.remove()
    ((grad, copy),) = seen
    assert torch.equal(grad, copy)
    assert_same(taken(model), plain)

"""Norms of q and k that wait for the rotary embedding: on upstream's own attentions, and on one that misbehaves."""

import functools
import types
from collections import Counter

import pytest
import torch
import upstream
from accuracy import INTERPRETED, check
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from sloth_plugins import application
from sloth_plugins.patches.forwards import deferred_norm, rms_norm, rope
from sloth_plugins.patches.kernels import ops
from sloth_plugins.registry import Patch
from sloth_plugins.resolving import bind

FORWARDS = "sloth_plugins.patches.forwards"
SEQ, DIM, HIDDEN = 5, 8, 24
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": DIM, "hidden_size": HIDDEN}
# attention: (config, prefix of its module's classes, factory of its norms)
KINDS = {
    Qwen3Attention: (Qwen3Config, "Qwen3", "cast_before_weight"),
    Gemma3Attention: (Gemma3TextConfig, "Gemma3", "offset_one"),
}
FUSED, ONE_BY_ONE = {"qk_norm_rope": 1}, {"rms_norm": 2, "apply_rotary": 1}


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    """How often each op ran."""
    counts = Counter()

    def counted(name, op):
        def run(*args, **kwargs):
            counts[name] += 1
            return op(*args, **kwargs)

        return run

    for name in ("qk_norm_rope", "rms_norm", "apply_rotary"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    yield counts
    assert deferred_norm.owed() is None


def bindings(kind, norm=None):
    """The bindings of a kind's attention and of its norms; `norm` names another factory than the norms' own."""
    _, prefix, order = KINDS[kind]
    module = kind.__module__
    patches = (
        Patch(
            name="rope",
            target=f"{module}:apply_rotary_pos_emb",
            within=f"{module}:{prefix}Attention",
            replacement=f"{FORWARDS}.rope:promote_after_norm",
        ),
        Patch(name="rms_norm", target=f"{module}:{prefix}RMSNorm", replacement=f"{FORWARDS}.rms_norm:{norm or order}"),
    )
    return [bind(patch) for patch in patches]


def attention(kind):
    """Upstream's attention with weights that all matter."""
    config = KINDS[kind][0](**SIZES, attn_implementation="sdpa")
    module = kind(config, layer_idx=0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def patch(module, norms=("q_norm", "k_norm")):
    on_attention, on_norm = bindings(type(module))
    application.apply([(module, [on_attention]), *((getattr(module, name), [on_norm]) for name in norms)])
    return module


def tables(dtype=torch.float32):
    angles = torch.randn(1, SEQ, DIM)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def call(module, x, cos, sin):
    return module(x, position_embeddings=(cos, sin), attention_mask=None)[0]


def with_parameters(module, cos, sin):
    """The attention as a function of its input and all of its parameters."""
    names = [name for name, _ in module.named_parameters()]

    def run(x, *parameters):
        arguments = {"position_embeddings": (cos.to(x.dtype), sin.to(x.dtype)), "attention_mask": None}
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,), arguments)[0]

    return run


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.mark.parametrize("frozen", [False, True], ids=["trained norms", "frozen norms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_upstream_in_one_op(kind, dtype, frozen, ran):
    stock, tensors = attention(kind).to(dtype), tables(dtype)
    inputs = [torch.randn(2, SEQ, HIDDEN).to(dtype), *(p.detach() for p in stock.parameters())]
    needs = [True, *(not (frozen and name.endswith("norm.weight")) for name, _ in stock.named_parameters())]
    plain = with_parameters(stock, *tensors)
    patched = attention(kind).to(dtype)
    check(with_parameters(patch(patched), *tensors), plain, inputs, needs)
    assert ran == FUSED


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_without_gradients(kind, quiet, ran):
    module, x, tensors = attention(kind), torch.randn(2, SEQ, HIDDEN), tables()
    expected = call(module, x, *tensors)
    patch(module)
    with quiet():
        torch.testing.assert_close(call(module, x, *tensors), expected)
    assert ran == FUSED


def test_under_autocast(kind, ran):
    if INTERPRETED:
        pytest.skip("the interpreter truncates bf16")
    module, x, tensors = attention(kind), torch.randn(2, SEQ, HIDDEN), tables()
    with torch.autocast("cpu", torch.bfloat16):
        expected = call(module, x, *tensors)
        found = call(patch(module), x, *tensors)
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected)
    assert ran == FUSED


HOOKS = {
    "forward": lambda norm, seen: norm.register_forward_hook(lambda _, __, y: seen.append(y)),
    "forward pre": lambda norm, seen: norm.register_forward_pre_hook(lambda _, x: None),
    "backward": lambda norm, seen: norm.register_full_backward_hook(lambda _, __, ___: None),
    "global": lambda norm, seen: nn.modules.module.register_module_forward_hook(
        lambda module, _, y: seen.append(y) if module is norm else None
    ),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_a_watched_norm_runs_where_it_is_called(kind, name, hook, ran):
    module, x, tensors, seen = attention(kind), torch.randn(2, SEQ, HIDDEN), tables(), []
    handle = HOOKS[hook](getattr(module, name), seen)
    try:
        expected = call(module, x, *tensors)
        found = call(patch(module), x, *tensors)
    finally:
        handle.remove()
    torch.testing.assert_close(found, expected)
    if seen:
        upstreams, ours = seen
        torch.testing.assert_close(ours, upstreams)
    assert ran == ONE_BY_ONE


CHANGES = {
    "its own forward": lambda norm: setattr(norm, "forward", types.MethodType(type(norm).forward, norm)),
    "a parametrization": lambda norm: nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_norm_runs_where_it_is_called(kind, change, ran):
    module, x, tensors = attention(kind), torch.randn(2, SEQ, HIDDEN), tables()
    expected = call(module, x, *tensors)
    change(patch(module).k_norm)
    torch.testing.assert_close(call(module, x, *tensors), expected)
    assert ran == ONE_BY_ONE


@pytest.mark.parametrize("norms", [(), ("q_norm",), ("k_norm",)], ids=str)
def test_norms_that_are_not_patched_run_as_upstream_wrote_them(kind, norms, ran):
    module, x, tensors = attention(kind), torch.randn(2, SEQ, HIDDEN), tables()
    expected = call(module, x, *tensors)
    torch.testing.assert_close(call(patch(module, norms), x, *tensors), expected)
    assert ran == {"apply_rotary": 1} | ({"rms_norm": 1} if norms else {})


def test_norms_of_two_kinds_run_one_by_one(ran):
    module, x, tensors = patch(attention(Qwen3Attention)), torch.randn(2, SEQ, HIDDEN), tables()
    expected = call(module, x, *tensors)
    ran.clear()
    # In fp32 the two orders are the same function.
    application.apply([(module.k_norm, [bindings(Qwen3Attention, "cast_after_weight")[1]])])
    torch.testing.assert_close(call(module, x, *tensors), expected)
    assert ran == ONE_BY_ONE


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_in_a_checkpoint(kind, reentrant, ran):
    module, tensors, grads = attention(kind), tables(), []
    x = torch.randn(2, SEQ, HIDDEN, requires_grad=True)
    parameters = [x, *module.parameters()]
    grads.append(torch.autograd.grad(call(module, x, *tensors).pow(2).sum(), parameters))
    patch(module)
    checkpoint(call, module, x, *tensors, use_reentrant=reentrant).pow(2).sum().backward()
    grads.append(tuple(p.grad for p in parameters))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    assert ran == {"qk_norm_rope": 2}


@pytest.mark.filterwarnings("ignore")  # Dynamo's own imports warn
def test_compiled_as_upstream_wrote_it(kind, ran):
    module, x, tensors = attention(kind), torch.randn(2, SEQ, HIDDEN), tables()
    expected = call(module, x, *tensors)
    compiled = torch.compile(patch(module), backend="eager", fullgraph=True)
    torch.testing.assert_close(call(compiled, x, *tensors), expected)
    assert not ran
    torch._dynamo.reset()


class Norm(nn.Module):
    """Llama's, over DIM features."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(DIM))
        self.eps = 1e-5

    def forward(self, hidden_states):
        return upstream.rms_norm(hidden_states, self.weight, self.eps)


class Attention(nn.Module):
    """Norms its input as q and as k, lets `between` do something to both, and rotates them if `rotate` is given."""

    def __init__(self, between=lambda q, k: (q, k), rotate=upstream.apply_rotary):
        super().__init__()
        self.q_norm, self.k_norm = Norm(), Norm()
        self.between, self.rotate = between, rotate

    def forward(self, x, cos, sin):
        q, k = self.between(self.q_norm(x), self.k_norm(x + 1))
        return self.rotate(q, k, cos, sin) if self.rotate else (q, k)


class PatchedNorm(Norm):
    forward = rms_norm.cast_before_weight(Norm.forward)


class PatchedAttention(Attention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.q_norm, self.k_norm = PatchedNorm(), PatchedNorm()
        self.rotate = self.rotate and rope.promote_after_norm(self.rotate)

    forward = deferred_norm.deferring(Attention.forward)


def stock_of(patched):
    stock = Attention(patched.between, upstream.apply_rotary if patched.rotate else None)
    stock.load_state_dict(patched.state_dict(), assign=True)  # of the same dtypes
    return stock


def x_and_tables():
    return torch.randn(2, 3, SEQ, DIM), *tables()


def assert_as_stock(patched, *arguments):
    for ours, expected in zip(patched(*arguments), stock_of(patched)(*arguments), strict=True):
        torch.testing.assert_close(ours, expected)


HARMLESS = {"nothing": lambda q, k: (q, k), "a view": lambda q, k: (q.view_as(q), k.mT.mT)}


@pytest.mark.parametrize("between", HARMLESS.values(), ids=HARMLESS.keys())
def test_views_are_settled(between, ran):
    assert_as_stock(PatchedAttention(between), *x_and_tables())
    assert ran == FUSED


CHANGED = {
    "a copy": lambda q, k: (q, k.clone()),
    "another tensor": lambda q, k: (q, k * 2),
    "in place": lambda q, k: (q, k.mul_(2)),
    "a part": lambda q, k: (q, k[:, :2]),
    "another last dimension": lambda q, k: (q, k.mT),
    "another type's view": lambda q, k: (q, k.view(torch.int32)),
}


@pytest.mark.parametrize("between", CHANGED.values(), ids=CHANGED.keys())
def test_what_the_norms_did_not_return_is_refused(between):
    with pytest.raises(RuntimeError, match=r"PatchedAttention\.forward changed k .*SLOTH_PLUGINS=\.\.\.,-\*:rope"):
        PatchedAttention(between)(*x_and_tables())
    assert deferred_norm.owed() is None


def test_q_and_k_in_the_wrong_places_are_refused():
    with pytest.raises(RuntimeError, match="changed q"):
        PatchedAttention(lambda q, k: (k, q))(*x_and_tables())


def test_an_attention_that_never_rotates_is_refused():
    with pytest.raises(RuntimeError, match=r"PatchedAttention\.forward called a norm .*SLOTH_PLUGINS=\.\.\.,-\*:rope"):
        PatchedAttention(rotate=None)(*x_and_tables())
    assert deferred_norm.owed() is None


def test_an_exception_passes_and_leaves_nothing_owed(ran):
    def fail(q, k):
        raise KeyError("theirs")

    module = PatchedAttention(fail)
    arguments = x_and_tables()
    with pytest.raises(KeyError, match="theirs"):
        module(*arguments)
    assert deferred_norm.owed() is None
    torch.testing.assert_close(module.q_norm(arguments[0]), Norm.forward(module.q_norm, arguments[0]))
    module.between = HARMLESS["nothing"]
    assert_as_stock(module, *arguments)
    assert ran == {"rms_norm": 1, "qk_norm_rope": 1}


def test_a_norm_called_again_runs_at_once(ran):
    module = PatchedAttention()
    module.between = lambda q, k: (q, k, again.append(module.q_norm(q.detach() + 1)))[:2]
    again, (x, cos, sin) = [], x_and_tables()
    q_out, _ = module(x, cos, sin)
    torch.testing.assert_close(again[0], Norm.forward(module.q_norm, x + 1))
    torch.testing.assert_close(q_out, upstream.apply_rotary(Norm.forward(module.q_norm, x), x, cos, sin)[0])
    assert ran == {"rms_norm": 1, "qk_norm_rope": 1}


@pytest.mark.parametrize("watched", [False, True])
def test_an_attention_inside_another_settles_for_itself_alone(watched, ran):
    inner, results, arguments = PatchedAttention(), [], x_and_tables()
    if watched:
        inner.q_norm.register_forward_hook(lambda *_: None)
    expected = stock_of(inner)(*arguments)
    outer = PatchedAttention(lambda q, k: (q, k, results.append(inner(*arguments)))[:2])
    assert_as_stock(outer, *arguments)
    for ours, theirs in zip(results[0], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    # The inner one runs twice, the second time within the stock copy of the outer one.
    assert ran == ({"qk_norm_rope": 1, "rms_norm": 4, "apply_rotary": 2} if watched else {"qk_norm_rope": 3})


def test_norms_that_the_fused_op_does_not_take_run_one_by_one(ran):
    module = PatchedAttention()
    module.k_norm.half()
    assert_as_stock(module, *x_and_tables())
    assert ran == ONE_BY_ONE


def test_one_norm_that_the_kernel_does_not_take(ran):
    """Upstream's own code norms k in fp64, so that only q is owed, and rotates what are now two dtypes."""
    module = PatchedAttention()
    module.k_norm.double()
    assert_as_stock(module, *x_and_tables())
    assert ran == {"rms_norm": 1}


def test_tables_that_want_a_gradient(ran):
    module, (x, cos, sin) = PatchedAttention(), x_and_tables()
    assert_as_stock(module, x, cos.requires_grad_(), sin)
    assert ran == {"rms_norm": 2}


def test_an_attention_without_norms_is_none_of_its_business(ran):
    class Plain(nn.Module):
        forward = deferred_norm.deferring(lambda self, x: x + 1)

    assert Plain()(torch.zeros(1)) == 1


def test_who_wraps_a_norms_forward_is_not_taken_for_it(ran):
    """functools.wraps copies attributes: a wrapper would pass for the forward that it wraps, and see no norm run."""
    seen = []

    class Wrapped(PatchedNorm):
        @functools.wraps(PatchedNorm.forward)
        def forward(self, hidden_states):
            seen.append(super().forward(hidden_states))
            return seen[-1]

    module, arguments = PatchedAttention(), x_and_tables()
    module.q_norm = Wrapped()
    assert_as_stock(module, *arguments)
    assert ran == ONE_BY_ONE
    torch.testing.assert_close(seen[0], Norm.forward(module.q_norm, arguments[0]))

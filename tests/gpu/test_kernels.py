"""The Triton kernels on a GPU at real shapes, held to the same tolerance as in tests/kernels."""

import copy
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # accuracy.py and upstream.py live there

import upstream
from accuracy import check

from sloth_plugins.patches.forwards import layer_norm as forwards
from sloth_plugins.patches.kernels import dispatch, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("_on_gpu"),
]

EPS = 1e-5
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
swiglu, silu_glu = (partial(f, activation="silu") for f in (ops.glu, upstream.glu))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOKENS = 2048
# hidden, feed-forward, q heads, kv heads, head dim
MODELS = {"1B": (2048, 8192, 32, 8, 64), "8B": (4096, 14336, 32, 8, 128), "70B": (8192, 28672, 64, 8, 128)}
NORMS = {
    "llama": {},
    "olmo2": {"cast_before_weight": False},
    "gemma": {"cast_before_weight": False, "offset": 1.0},
}


def norm_inputs(*shape, dtype):
    return torch.randn(shape).to(dtype), (1 + 0.2 * torch.randn(shape[-1])).to(dtype)


def tables(batch, seq, rotated, dtype=torch.float32):
    angles = torch.randn(batch, seq, rotated)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def compare_rotary(view, leaves, cos, sin, **options):
    def plain(*leaves):
        wide = leaves[0].dtype is torch.float64
        return upstream.apply_rotary(*view(*leaves), *(t.double() if wide else t for t in (cos, sin)), **options)

    check(lambda *leaves: ops.apply_rotary(*view(*leaves), cos, sin, **options), plain, leaves)


def test_backend_is_triton():
    assert dispatch.backend_for(torch.ones(2, 3)) == "triton"
    assert dispatch.backend_for(torch.ones(2, 3), torch.ones(3, device="cpu")) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
@pytest.mark.parametrize("model", MODELS)
def test_rms_norm(model, norm, dtype):
    fused, plain = (partial(f, eps=EPS, **norm) for f in (ops.rms_norm, upstream.rms_norm))
    check(fused, plain, norm_inputs(1, TOKENS, MODELS[model][0], dtype=dtype))


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["frozen w", "frozen x"])
@pytest.mark.parametrize("n", [3, 100, 4096, 4097, 8192, 12288, 16384, 20000, 32768, 40000, 65536])
def test_rms_norm_row_lengths(n, needs):
    fused, plain = (partial(f, eps=EPS) for f in (ops.rms_norm, upstream.rms_norm))
    check(fused, plain, norm_inputs(33, n, dtype=torch.bfloat16), needs)
    check(fused, plain, norm_inputs(33, n, dtype=torch.float32), (True, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_query_heads(dtype):
    fused, plain = (partial(f, eps=EPS) for f in (ops.rms_norm, upstream.rms_norm))
    x, w = norm_inputs(2, 700, 32, 128, dtype=dtype)
    check(lambda x, w: fused(x.transpose(1, 2), w), lambda x, w: plain(x.transpose(1, 2), w), (x, w))
    # Heads of one fused projection: neither dense nor one stride.
    check(lambda x, w: fused(x[:, :, 3:20].mT.mT, w), lambda x, w: plain(x[:, :, 3:20], w), (x, w))


def layer_norm_inputs(*shape, dtype):
    return *norm_inputs(*shape, dtype=dtype), torch.randn(shape[-1]).to(dtype)


def plain_layer_norm(x, weight, bias):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)


layer_norm = partial(ops.layer_norm, eps=EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_layer_norm(model, dtype):
    check(layer_norm, plain_layer_norm, layer_norm_inputs(1, TOKENS, MODELS[model][0], dtype=dtype))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True), (True, False, True)], ids=str)
@pytest.mark.parametrize("n", [3, 100, 2560, 4096, 4097, 8192, 12288, 16384])
def test_layer_norm_row_lengths(n, needs):
    check(layer_norm, plain_layer_norm, layer_norm_inputs(33, n, dtype=torch.bfloat16), needs)
    check(layer_norm, plain_layer_norm, layer_norm_inputs(33, n, dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_of_strided_rows(dtype):
    given = layer_norm_inputs(2, 700, 32, 128, dtype=dtype)
    check(lambda x, *p: layer_norm(x.transpose(1, 2), *p), lambda x, *p: plain_layer_norm(x.transpose(1, 2), *p), given)
    # Heads of one fused projection: neither dense nor one stride.
    check(lambda x, *p: layer_norm(x[:, :, 3:20], *p), lambda x, *p: plain_layer_norm(x[:, :, 3:20], *p), given)


@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_layer_norm_of_values_far_from_zero(mean):
    x, *parameters = layer_norm_inputs(TOKENS, 4096, dtype=torch.float32)
    check(layer_norm, plain_layer_norm, (mean + x, *parameters))


def test_layer_norm_dtypes_are_those_that_torch_takes():
    for dtype in DTYPES:
        for parameter_dtype in DTYPES:
            x, *parameters = torch.ones(2, 8, dtype=dtype), *torch.ones(2, 8, dtype=parameter_dtype)
            supported = ops.supports_layer_norm(x, *parameters)
            assert supported is (dtype is parameter_dtype)
            if not supported:
                with pytest.raises(RuntimeError):
                    plain_layer_norm(x, *parameters)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameter_dtype", DTYPES, ids=str)
def test_layer_norm_forward_under_autocast(parameter_dtype, dtype, monkeypatch):
    """Upstream's runs in fp32 there, whatever it is given, and so must the patched one."""
    taken = []
    monkeypatch.setattr(ops, "layer_norm", lambda *args, run=ops.layer_norm: taken.append(args) or run(*args))
    stock = torch.nn.LayerNorm(64, dtype=parameter_dtype, device="cuda")
    patched = copy.deepcopy(stock)
    patched.forward = types.MethodType(forwards.layer_norm(torch.nn.LayerNorm.forward), patched)
    x = torch.randn(5, 64).to(dtype)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours, theirs = patched(x), stock(x)
    assert ours.dtype is theirs.dtype is torch.float32
    torch.testing.assert_close(ours, theirs)
    assert len(taken) == 1
    ours.sum().backward()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        stock(x).sum().backward()
    for mine, its in zip(patched.parameters(), stock.parameters(), strict=True):
        assert mine.grad.dtype is its.grad.dtype
        torch.testing.assert_close(mine.grad, its.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_rotary(model, unsqueeze_dim, dtype):
    _, _, heads, kv_heads, dim = MODELS[model]
    leaves = tuple(torch.randn(1, TOKENS, n * dim).to(dtype) for n in (heads, kv_heads))

    def view(*leaves):
        split = [x.view(1, TOKENS, -1, dim) for x in leaves]
        return [x.transpose(1, 2) for x in split] if unsqueeze_dim == 1 else split

    compare_rotary(view, leaves, *tables(1, TOKENS, dim, dtype), unsqueeze_dim=unsqueeze_dim)


@pytest.mark.parametrize("keep_dtype", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotated"), [(28, 4, 96, 96), (40, 10, 128, 32), (71, 1, 64, 20)])
def test_rotary_odd_shapes_and_tables(heads, kv_heads, dim, rotated, keep_dtype):
    def view(q, k):
        return q.transpose(1, 2), k[..., :dim]

    leaves = torch.randn(2, 300, heads, dim).bfloat16(), torch.randn(2, kv_heads, 300, dim + 4).bfloat16()
    compare_rotary(view, leaves, *tables(2, 300, rotated), keep_dtype=keep_dtype)
    cos, sin = (t.expand(2, -1, -1) for t in tables(1, 300, rotated, torch.bfloat16))
    compare_rotary(view, leaves, cos, sin, keep_dtype=keep_dtype)


HEAD_EPS = {"q_eps": EPS, "k_eps": EPS}


def compare_qk_norm_rope(view, leaves, cos, sin, needs=(True,) * 4, **options):
    def plain(q, k, *weights):
        wide = q.dtype is torch.float64
        tables = (t.double() if wide else t for t in (cos, sin))
        return upstream.qk_norm_rope(*view(q, k), *weights, *tables, **HEAD_EPS, **options)

    def fused(q, k, *weights):
        return ops.qk_norm_rope(*view(q, k), *weights, cos, sin, **HEAD_EPS, **options)

    check(fused, plain, leaves, needs)


def head_weights(dim, dtype):
    return [(1 + 0.2 * torch.randn(dim)).to(dtype) for _ in "qk"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen w", "trained w"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_qk_norm_rope(model, unsqueeze_dim, norm, trained, dtype):
    _, _, heads, kv_heads, dim = MODELS[model]
    leaves = [torch.randn(1, TOKENS, n * dim).to(dtype) for n in (heads, kv_heads)]

    def view(*leaves):
        split = [x.view(1, TOKENS, -1, dim) for x in leaves]
        return [x.transpose(1, 2) for x in split] if unsqueeze_dim == 1 else split

    needs = (True, True, trained, trained)
    leaves += head_weights(dim, dtype)
    compare_qk_norm_rope(view, leaves, *tables(1, TOKENS, dim, dtype), needs, unsqueeze_dim=unsqueeze_dim, **norm)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(28, 4, 96), (8, 4, 256), (71, 1, 64), (1, 1, 8), (3, 2, 1024)])
def test_qk_norm_rope_odd_shapes_and_weights(heads, kv_heads, dim, weight_dtype):
    def view(q, k):
        return q.transpose(1, 2), k[..., :dim]

    leaves = [torch.randn(3, 301, heads, dim).bfloat16(), torch.randn(3, kv_heads, 301, dim + 4).bfloat16()]
    leaves += head_weights(dim, weight_dtype)
    for batch, norm in ((1, NORMS["llama"]), (3, NORMS["gemma"])):
        cos, sin = tables(batch, 301, dim, torch.bfloat16)
        compare_qk_norm_rope(view, leaves, cos, sin, **norm)
        for needs in ((True, False, False, True), (False, True, False, False)):
            compare_qk_norm_rope(view, leaves, cos, sin, needs, **norm)


@pytest.mark.parametrize("heads", [1, 32])
def test_qk_norm_rope_into_the_gradients_buffers(heads):
    """One head is fewer numbers than a program has threads: none may read what another has overwritten."""
    leaves = [torch.randn(1, n, TOKENS, 16, requires_grad=True) for n in (heads, 1)]
    weights = [w.requires_grad_() for w in head_weights(16, torch.float32)]
    cos, sin = tables(1, TOKENS, 16)
    found = []
    for keep in (False, True):
        kept = []
        outputs = ops.qk_norm_rope(*leaves, *weights, cos, sin, **HEAD_EPS)
        if keep:
            for out in outputs:
                out.register_hook(kept.append)
        loss = sum((out * 3).sum() for out in outputs)
        del outputs
        found.append(torch.autograd.grad(loss, [*leaves, *weights]))
    for reused, fresh in zip(*found, strict=True):
        assert torch.equal(reused, fresh)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("model", MODELS)
def test_glu(model, activation, dtype):
    shape = (1, TOKENS, MODELS[model][1])
    fused, plain = (partial(f, activation=activation) for f in (ops.glu, upstream.glu))
    check(fused, plain, (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [100, 4097, 14336])
def test_glu_of_a_fused_projection(width, activation):
    gate_up = torch.randn(2, 300, 2 * width).bfloat16()
    fused, plain = (partial(f, activation=activation) for f in (ops.glu_fused, upstream.glu_fused))
    check(fused, plain, (gate_up,))
    # The halves as two inputs that are views of one tensor.
    check(lambda x: ops.glu(*x.chunk(2, -1), activation), plain, (gate_up,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activate(activation, dtype):
    fused, plain = (partial(f, activation=activation) for f in (ops.activate, upstream.activate))
    check(fused, plain, (torch.randn(TOKENS, 10240).mul(3).to(dtype),))
    check(lambda x: fused(x.mT), lambda x: plain(x.mT), (torch.randn(2, 300, 100).to(dtype),))
    check(lambda x: fused(x[:, 1:]), lambda x: plain(x[:, 1:]), (torch.randn(300, 4097).to(dtype),))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_activations(activation):
    x = torch.tensor([-1e38, -1e30, -1e20, -6e4, -100.0, 0.0, 100.0, 6e4, 1e20, 1e30, 1e38]).requires_grad_()
    y = ops.activate(x, activation)
    y.sum().backward()
    torch.testing.assert_close(y, x.detach().clamp(min=0))
    torch.testing.assert_close(x.grad, torch.where(x == 0, 0.5, (x > 0).float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_forwards_equal_upstream(dtype):
    """Bit for bit, but for the few values that an exp or a sum in another order puts on the other side of a tie."""
    x, w = norm_inputs(TOKENS, 4096, dtype=dtype)
    q, k = torch.randn(1, 32, TOKENS, 128).to(dtype), torch.randn(1, 8, TOKENS, 128).to(dtype)
    cos, sin = tables(1, TOKENS, 128, dtype)
    for ours, theirs in zip(ops.apply_rotary(q, k, cos, sin), upstream.apply_rotary(q, k, cos, sin), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in (
        (ops.rms_norm(x, w, EPS), upstream.rms_norm(x, w, EPS)),
        (layer_norm(x, w, w), plain_layer_norm(x, w, w)),
        *((ops.glu(x, x + 1, name), upstream.glu(x, x + 1, name)) for name in ACTIVATIONS),
    ):
        assert (ours != theirs).float().mean() < 2e-3
        torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_fp32_rotary_equals_upstream():
    q, k = torch.randn(1, 4, 300, 64), torch.randn(1, 2, 300, 64)
    cos, sin = tables(1, 300, 64)
    for ours, theirs in zip(ops.apply_rotary(q, k, cos, sin), upstream.apply_rotary(q, k, cos, sin), strict=True):
        assert torch.equal(ours, theirs)


def test_backward_reuses_memory_in_the_plain_case():
    """The reference counts on which reuse rests are the same with compiled kernels and the engine's CUDA thread."""
    x, seen = torch.randn(64, 128, requires_grad=True), []
    gate, up = x * 2, x * 3
    at = gate.data_ptr()
    gate.grad_fn.register_prehook(lambda grads: seen.append(grads[0].data_ptr()))
    loss = (swiglu(gate, up) * 2).sum()
    del gate, up
    loss.backward()
    assert seen == [at]
    seen.clear()
    h = x * 2
    h.grad_fn.register_prehook(lambda grads: seen.append(grads[0].data_ptr()))
    y = ops.rms_norm(h, torch.ones(128), EPS)
    y.grad_fn.register_prehook(lambda grads: seen.append(grads[0].data_ptr()))
    loss = (y * 2).sum()
    del h, y
    loss.backward()
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_kept_graph_gives_the_same_gradients_twice():
    x = torch.randn(64, 128, requires_grad=True)
    loss = (swiglu(ops.rms_norm(x * 2, torch.ones(128), EPS) * 2, x * 3) * 2).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


def test_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = torch.randn(8, 64, device="cuda:1", requires_grad=True)
    y = swiglu(ops.rms_norm(x, torch.ones(64, device="cuda:1"), EPS), x * 2)
    y.sum().backward()
    expected = silu_glu(upstream.rms_norm(x, torch.ones(64, device="cuda:1"), EPS), x * 2)
    torch.testing.assert_close(y, expected)

from functools import partial

import pytest
import torch
import upstream
from accuracy import INTERPRETED, check

from sloth_plugins.patches.kernels import ops

pytestmark = pytest.mark.usefixtures("_poisoned")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = {"q_eps": 1e-5, "k_eps": 1e-3}
QWEN, GEMMA = {}, {"cast_before_weight": False, "offset": 1.0}
ORDERS = {"qwen": QWEN, "gemma": GEMMA, "olmo": {"cast_before_weight": False}}
fused = partial(ops.qk_norm_rope, **EPS)


def tables(batch, seq, dim, dtype=torch.float32):
    """cos and sin whose halves differ, unlike the usual ones."""
    angles = torch.randn(batch, seq, dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def weights(dim, dtype=torch.float32):
    return [(1 + 0.2 * torch.randn(dim)).to(dtype) for _ in "qk"]


def inputs(heads=4, kv_heads=2, seq=3, dim=8, batch=2, dtype=torch.float32, weight_dtype=None):
    q, k = (torch.randn(batch, n, seq, dim).to(dtype) for n in (heads, kv_heads))
    return q, k, *weights(dim, weight_dtype or dtype)


def compare(leaves, cos, sin, view=lambda x: x, outgoing=torch.randn_like, needs=(True,) * 4, **options):
    def plain(q, k, *weights):
        # Only the truth is computed in float64; its cos and sin are the same numbers.
        wide = (cos.double(), sin.double()) if q.dtype is torch.float64 else (cos, sin)
        return upstream.qk_norm_rope(view(q), view(k), *weights, *wide, **EPS, **options)

    check(lambda q, k, *weights: fused(view(q), view(k), *weights, cos, sin, **options), plain, leaves, needs, outgoing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3], ids=["broadcast", "per batch"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 8), (3, 1, 24), (5, 5, 64), (2, 1, 256), (1, 4, 2)])
def test_values_and_gradients(heads, kv_heads, dim, order, batch, dtype):
    compare(inputs(heads, kv_heads, 5, dim, 3, dtype), *tables(batch, 5, dim, dtype), **order)


def test_more_heads_than_a_program_holds_at_a_time():
    compare(inputs(71, 1, 3, 64), *tables(1, 3, 64))
    compare(inputs(1, 71, 3, 64), *tables(2, 3, 64), **GEMMA)


@pytest.mark.parametrize("order", [QWEN, GEMMA], ids=["qwen", "gemma"])
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_projection_views_keep_their_strides(unsqueeze_dim, order):
    cos, sin = tables(2, 5, 16)

    def view(x):
        x = x.view(2, 5, -1, 16)
        return x.transpose(1, 2) if unsqueeze_dim == 1 else x

    q, k, (q_weight, k_weight) = torch.randn(2, 5, 64), torch.randn(2, 5, 32), weights(16)
    compare((q, k, q_weight, k_weight), cos, sin, view, unsqueeze_dim=unsqueeze_dim, **order)
    q_out, k_out = fused(view(q), view(k), q_weight, k_weight, cos, sin, unsqueeze_dim=unsqueeze_dim, **order)
    assert q_out.stride() == view(q).stride()
    assert k_out.stride() == view(k).stride()


def test_slices_of_one_fused_projection():
    cos, sin = tables(1, 5, 16)

    def heads(qkv):
        q, k, _ = qkv.view(2, 5, 8, 16).split((4, 2, 2), dim=2)
        return q.transpose(1, 2), k.transpose(1, 2)

    def plain(qkv, *weights):
        wide = (cos.double(), sin.double()) if qkv.dtype is torch.float64 else (cos, sin)
        return upstream.qk_norm_rope(*heads(qkv), *weights, *wide, **EPS)

    check(lambda qkv, *weights: fused(*heads(qkv), *weights, cos, sin), plain, (torch.randn(2, 5, 128), *weights(16)))


def test_last_dim_not_contiguous():
    q, k, *rest = inputs()
    compare((q.mT.contiguous(), k.mT.contiguous(), *rest), *tables(2, 3, 8), view=lambda x: x.mT)


def test_expanded_inputs():
    compare(inputs(heads=1, kv_heads=1, batch=1), *tables(2, 3, 8), view=lambda x: x.expand(2, 4, 3, 8))


@pytest.mark.parametrize("which", ["expanded", "sliced", "doubled"])
def test_strided_tables_and_weights(which):
    cos, sin = tables(1, 3, 8)
    if which == "expanded":
        cos, sin = cos.expand(2, 3, 8), sin.expand(2, 3, 8)
    elif which == "sliced":
        cos, sin = torch.cat((cos, sin), -1).chunk(2, -1)
    else:
        cos = cos.repeat_interleave(2, -1)[..., ::2]
    compare(inputs(), cos, sin)
    q, k, q_weight, k_weight = inputs()
    every_second = q_weight.repeat_interleave(2)[::2]
    for ours, expected in zip(
        fused(q, k, every_second, k_weight, cos, sin), fused(q, k, q_weight, k_weight, cos, sin), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("keep_dtype", [False, True])
@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "table_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float16),
    ],
    ids=str,
)
def test_mixed_dtypes(dtype, weight_dtype, table_dtype, cast, keep_dtype):
    if INTERPRETED and dtype is torch.bfloat16 and weight_dtype is torch.float32:
        # All errors of one sign add up in an fp32 sum, as those of rounding do not; fp16 with fp32 stands for it.
        pytest.skip("the interpreter truncates bf16")
    leaves, (cos, sin) = inputs(dtype=dtype, weight_dtype=weight_dtype), tables(1, 3, 8, table_dtype)
    compare(leaves, cos, sin, cast_before_weight=cast, keep_dtype=keep_dtype)
    normed = torch.promote_types(dtype, weight_dtype) if cast else dtype
    expected = normed if keep_dtype else torch.promote_types(normed, table_dtype)
    assert {out.dtype for out in fused(*leaves, cos, sin, cast_before_weight=cast, keep_dtype=keep_dtype)} == {expected}


@pytest.mark.parametrize("order", [QWEN, GEMMA], ids=["qwen", "gemma"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_norm_and_rotary_one_after_the_other(dtype, order):
    """The same roundings as the two ops, which differ only in the order of a sum."""
    if INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("the interpreter truncates bf16")
    q, k, q_weight, k_weight = inputs(5, 2, 7, 24, dtype=dtype)
    cos, sin = tables(1, 7, 24, dtype)
    q_normed = ops.rms_norm(q, q_weight, EPS["q_eps"], **order)
    k_normed = ops.rms_norm(k, k_weight, EPS["k_eps"], **order)
    for ours, theirs in zip(
        fused(q, k, q_weight, k_weight, cos, sin, **order), ops.apply_rotary(q_normed, k_normed, cos, sin), strict=True
    ):
        off = ours != theirs
        # In fp32 a sum in another order shifts most of a row by one place; in half precision it seldom shows.
        assert dtype is torch.float32 or off.float().mean() < 0.02
        torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


NEEDS = {
    "frozen weights": (True, True, False, False),
    "trained weights": (False, False, True, True),
    "q": (True, False, False, False),
    "k": (False, True, False, False),
    "the weight of q": (False, False, True, False),
    "the weight of k": (False, False, False, True),
    "k and the weight of q": (False, True, True, False),
    "nothing": (False,) * 4,
}


@pytest.mark.parametrize("order", [QWEN, GEMMA], ids=["qwen", "gemma"])
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS.keys())
def test_only_the_gradients_that_are_wanted(needs, order):
    compare(inputs(seq=7), *tables(2, 7, 8), needs=needs, **order)


@pytest.mark.parametrize("tokens", [1, 2, 7, 9, 64, 65])
def test_weight_gradients_of_any_number_of_tokens(tokens):
    compare(inputs(batch=1, seq=tokens), *tables(1, tokens, 8))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen weights", "trained weights"])
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(used, trained):
    cos, sin = tables(2, 3, 8)
    tensors, grads = inputs(), []
    for op in (fused, partial(upstream.qk_norm_rope, **EPS)):
        leaves = [t.clone().requires_grad_(trained or i < 2) for i, t in enumerate(tensors)]
        torch.manual_seed(1)
        out = op(*leaves, cos, sin)[used]
        out.backward(torch.randn(out.shape))
        grads.append([leaves[used].grad, *([leaves[used + 2].grad] if trained else [])])
        for unused in (leaves[1 - used], leaves[3 - used]):
            assert unused.grad is None or not unused.grad.any()
    torch.testing.assert_close(*grads)


def test_outputs_that_nobody_differentiates_have_no_graph():
    q, k, *rest = inputs()
    q_out, k_out = fused(q.requires_grad_(), k, *rest, *tables(1, 3, 8))
    assert (q_out.requires_grad, k_out.requires_grad) == (True, False)


GRADIENTS = {
    "one number": lambda y: y.new_ones(()).expand(y.shape),
    "one vector": lambda y: torch.randn(y.shape[-1]).expand(y.shape),
    "other layout": lambda y: torch.randn(y.shape).transpose(1, 2).contiguous().transpose(1, 2),
    "every second": lambda y: torch.randn(*y.shape[:-1], 2 * y.shape[-1])[..., ::2],
}


@pytest.mark.parametrize("outgoing", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_strided_gradients(outgoing):
    compare(inputs(), *tables(2, 3, 8), outgoing=outgoing)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen weights", "trained weights"])
def test_the_incoming_gradient_is_overwritten_only_if_nobody_else_sees_it(trained):
    """With the buffer reused or not, the gradients are the same numbers, and a kept one stays as it was."""
    tensors, (cos, sin), kept, found = inputs(), tables(1, 3, 8), [], []
    for keep in (False, True):
        leaves = [t.clone().requires_grad_(trained or i < 2) for i, t in enumerate(tensors)]
        q_out, k_out = fused(*leaves, cos, sin)
        if keep:
            q_out.register_hook(lambda grad: kept.append((grad, grad.clone())))
        loss = (q_out * 2).pow(2).sum() + (k_out * 3).sum()
        del q_out, k_out
        loss.backward()
        found.append([leaf.grad for leaf in leaves if leaf.requires_grad])
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert torch.equal(*kept[0])


def test_the_gradients_buffers_are_reused_in_the_plain_case():
    q, k, *rest = (t.requires_grad_(i < 2) for i, t in enumerate(inputs()))
    seen = []
    q_in, k_in = q * 2, k * 2
    for t in (q_in, k_in):
        t.grad_fn.register_prehook(lambda grads: seen.append(grads[0].data_ptr()))
    outputs = fused(q_in, k_in, *rest, *tables(1, 3, 8))
    outputs[0].grad_fn.register_prehook(lambda grads: seen.extend(g.data_ptr() for g in grads))
    loss = sum((out * 2).sum() for out in outputs)
    del q_in, k_in, outputs
    loss.backward()
    assert len(seen) == 4
    assert sorted(seen[:2]) == sorted(seen[2:])


def test_zero_heads_are_zero():
    q, k, q_weight, k_weight = inputs()
    q = torch.zeros_like(q).requires_grad_()
    q_out, _ = fused(q, k, q_weight, k_weight, *tables(1, 3, 8))
    q_out.sum().backward()
    assert not q_out.any()
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("value", [1e4, 6e4, 1e-7])
def test_extreme_fp16_heads(value):
    q, k, *rest = inputs(dtype=torch.float16)
    compare(((q.float().sign() * value).half(), k, *rest), *tables(1, 3, 8, torch.float16))


def test_double_backward_raises():
    q, *rest = inputs()
    out = fused(q.requires_grad_(), *rest, *tables(1, 3, 8))[0]
    (dq,) = torch.autograd.grad(out.pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        dq.sum().backward()


@pytest.mark.not_interpreted(reason="its programs run one after the other")
def test_weight_gradients_are_deterministic():
    leaves = [t.requires_grad_() for t in inputs(batch=3, seq=50)]
    outputs = fused(*leaves, *tables(1, 50, 8))
    sent = [torch.randn_like(out) for out in outputs]
    first, second = (torch.autograd.grad(outputs, leaves, sent, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_saves_the_inputs_and_the_statistics():
    saved, leaves, (cos, sin) = [], [t.requires_grad_() for t in inputs()], tables(1, 3, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            quiet = fused(*leaves, cos, sin)
        assert saved == []
        fused(*leaves, cos, sin)
    assert [t.grad_fn for t in quiet] == [None, None]
    assert [t.data_ptr() for t in saved[:6]] == [t.data_ptr() for t in (*leaves, cos, sin)]
    assert [(t.shape, t.dtype) for t in saved[6:]] == [((2, 4, 3), torch.float32), ((2, 2, 3), torch.float32)]


def test_offset_needs_the_other_order():
    with pytest.raises(ValueError, match=r"offset 1\.0"):
        fused(*inputs(), *tables(1, 3, 8), offset=1.0)


def test_supports():
    q, k, q_weight, k_weight = inputs()
    cos, sin = tables(1, 3, 8)
    assert ops.supports_qk_norm_rope(q, k, q_weight, k_weight, cos, sin, 1)
    assert ops.supports_qk_norm_rope(q.transpose(1, 2), k.transpose(1, 2), q_weight, k_weight, cos, sin, 2)
    refused = {
        "heads and positions swapped": (q, k, q_weight, k_weight, cos, sin, 2),
        "another unsqueeze_dim": (q, k, q_weight, k_weight, cos, sin, 0),
        "cos wants a gradient": (q, k, q_weight, k_weight, cos.clone().requires_grad_(), sin, 1),
        "q and k of two dtypes": (q, k.half(), q_weight, k_weight, cos, sin, 1),
        "weights of two dtypes": (q, k, q_weight, k_weight.half(), cos, sin, 1),
        "a weight of another dtype than any": (q, k, q_weight.double(), k_weight.double(), cos, sin, 1),
        "a weight of another length": (q, k, q_weight[:4], k_weight, cos, sin, 1),
        "a weight for each head": (q, k, q_weight.expand(4, 8), k_weight, cos, sin, 1),
        "a part rotated": (q, k, q_weight, k_weight, cos[..., :4], sin[..., :4], 1),
        "odd dimension": (q[..., :7], k[..., :7], q_weight[:7], k_weight[:7], cos[..., :7], sin[..., :7], 1),
        "other positions": (q, k, q_weight, k_weight, cos[:, :2], sin[:, :2], 1),
        "long heads": (*inputs(dim=1026), *tables(1, 3, 1026), 1),
        "a tensor nowhere": (q, k, q_weight, k_weight.to("meta"), cos, sin, 1),
    }
    assert [why for why, args in refused.items() if ops.supports_qk_norm_rope(*args)] == []
    with pytest.raises(TypeError, match="ask its supports_ function"):
        fused(q, k, q_weight, k_weight.to("meta"), cos, sin)

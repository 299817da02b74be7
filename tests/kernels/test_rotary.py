from functools import partial

import pytest
import torch
import upstream
from accuracy import check

from sloth_plugins.patches.kernels import ops

pytestmark = pytest.mark.usefixtures("_poisoned")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tables(batch, seq, rotated, dtype=torch.float32):
    """cos and sin whose halves differ, unlike the usual ones."""
    angles = torch.randn(batch, seq, rotated)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def compare(q, k, cos, sin, view=lambda x: x, outgoing=torch.randn_like, needs=(True, True), **options):
    check(
        lambda q, k: ops.apply_rotary(view(q), view(k), cos, sin, **options),
        # Only the truth is computed in float64; its cos and sin are the same numbers.
        lambda q, k: upstream.apply_rotary(view(q), view(k), *(t.to(wider(q, t)) for t in (cos, sin)), **options),
        (q, k),
        needs,
        outgoing,
    )


def wider(q, table):
    return torch.float64 if q.dtype is torch.float64 else table.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2], ids=["broadcast", "per batch"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotated"),
    [(4, 2, 16, 16), (3, 1, 12, 12), (5, 5, 24, 10), (1, 1, 2, 2), (71, 1, 64, 64), (2, 6, 20, 4)],
)
def test_values_and_gradients(heads, kv_heads, dim, rotated, batch, dtype):
    q, k = torch.randn(2, heads, 3, dim).to(dtype), torch.randn(2, kv_heads, 3, dim).to(dtype)
    compare(q, k, *tables(batch, 3, rotated, dtype))


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("rotated", [16, 8])
def test_projection_views_keep_their_strides(unsqueeze_dim, rotated):
    cos, sin = tables(2, 5, rotated)

    def view(x):
        x = x.view(2, 5, -1, 16)
        return x.transpose(1, 2) if unsqueeze_dim == 1 else x

    q, k = torch.randn(2, 5, 64), torch.randn(2, 5, 32)
    compare(q, k, cos, sin, view, unsqueeze_dim=unsqueeze_dim)
    q_out, k_out = ops.apply_rotary(view(q), view(k), cos, sin, unsqueeze_dim=unsqueeze_dim)
    assert q_out.stride() == view(q).stride()
    assert k_out.stride() == view(k).stride()


def test_slices_of_one_fused_projection():
    cos, sin = tables(1, 5, 16)

    def heads(qkv):
        q, k, _ = qkv.view(2, 5, 8, 16).split((4, 2, 2), dim=2)
        return q.transpose(1, 2), k.transpose(1, 2)

    check(
        lambda qkv: ops.apply_rotary(*heads(qkv), cos, sin),
        lambda qkv: upstream.apply_rotary(*heads(qkv), *(t.to(wider(qkv, t)) for t in (cos, sin))),
        (torch.randn(2, 5, 128),),
    )


def test_last_dim_not_contiguous():
    cos, sin = tables(2, 3, 8)
    q, k = torch.randn(2, 4, 8, 3), torch.randn(2, 2, 8, 3)
    compare(q, k, cos, sin, view=lambda x: x.transpose(2, 3))
    assert ops.apply_rotary(q.mT, k.mT, cos, sin)[0].stride() == q.mT.stride()


@pytest.mark.parametrize("which", ["expanded", "sliced", "doubled"])
def test_strided_tables(which):
    cos, sin = tables(1, 3, 8)
    if which == "expanded":
        cos, sin = cos.expand(2, 3, 8), sin.expand(2, 3, 8)
    elif which == "sliced":
        cos, sin = torch.cat((cos, sin), -1).chunk(2, -1)
    else:
        cos, sin = cos.repeat_interleave(2, -1)[..., ::2], sin
    compare(torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), cos, sin)


@pytest.mark.parametrize("keep_dtype", [False, True])
@pytest.mark.parametrize(
    ("dtype", "table_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_mixed_dtypes(dtype, table_dtype, keep_dtype):
    cos, sin = tables(1, 3, 8, table_dtype)
    q, k = torch.randn(2, 4, 3, 8).to(dtype), torch.randn(2, 2, 3, 8).to(dtype)
    compare(q, k, cos, sin, keep_dtype=keep_dtype)
    expected = dtype if keep_dtype else torch.promote_types(dtype, table_dtype)
    assert ops.apply_rotary(q, k, cos, sin, keep_dtype=keep_dtype)[1].dtype is expected


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
def test_only_the_gradients_that_are_wanted(needs):
    compare(torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), *tables(2, 3, 8), needs=needs)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(used):
    cos, sin = tables(2, 3, 8)
    tensors = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    grads = []
    for rotate in (ops.apply_rotary, upstream.apply_rotary):
        leaves = [t.clone().requires_grad_() for t in tensors]
        torch.manual_seed(1)
        out = rotate(*leaves, cos, sin)[used]
        out.backward(torch.randn(out.shape))
        grads.append(leaves[used].grad)
        unused = leaves[1 - used].grad
        assert unused is None or not unused.any()
    torch.testing.assert_close(*grads)


GRADIENTS = {
    "one number": lambda y: y.new_ones(()).expand(y.shape),
    "one vector": lambda y: torch.randn(y.shape[-1]).expand(y.shape),
    "other layout": lambda y: torch.randn(y.shape).transpose(1, 2).contiguous().transpose(1, 2),
    "every second": lambda y: torch.randn(*y.shape[:-1], 2 * y.shape[-1])[..., ::2],
}


@pytest.mark.parametrize("outgoing", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_strided_gradients(outgoing):
    compare(torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), *tables(2, 3, 6), outgoing=outgoing)


def test_double_backward_raises():
    q, k = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(1, 2, 3, 8)
    out = ops.apply_rotary(q, k, *tables(1, 3, 8))[0]
    (dq,) = torch.autograd.grad(out.pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        dq.sum().backward()


def test_saves_only_the_tables():
    saved = []
    q, k = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(1, 2, 3, 8)
    rotate = partial(ops.apply_rotary, q, k, *tables(1, 3, 8))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            rotate()
        assert saved == []
        rotate()
    assert [t.shape for t in saved] == [(1, 3, 8), (1, 3, 8)]


def test_supports():
    q, k, (cos, sin) = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 3, 8), tables(1, 3, 8)
    assert ops.supports_rotary(q, k, cos, sin, 1)
    assert ops.supports_rotary(q.mT.mT.transpose(1, 2), k.transpose(1, 2), cos, sin, 2)
    refused = {
        "heads and positions swapped": (q, k, cos, sin, 2),
        "another unsqueeze_dim": (q, k, cos, sin, 0),
        "cos wants a gradient": (q, k, cos.clone().requires_grad_(), sin, 1),
        "sin wants a gradient": (q, k, cos, sin.clone().requires_grad_(), 1),
        "q and k of two dtypes": (q, k.half(), cos, sin, 1),
        "cos and sin of two dtypes": (q, k, cos, sin.half(), 1),
        "odd rotary dimension": (q, k, cos[..., :7], sin[..., :7], 1),
        "rotary dimension too large": (q[..., :6], k[..., :6], cos, sin, 1),
        "cos without a batch": (q, k, cos[0], sin[0], 1),
        "cos of another batch": (q, k, cos.expand(3, 3, 8), sin.expand(3, 3, 8), 1),
        "other positions": (q, k, cos[:, :2], sin[:, :2], 1),
        "three dimensions": (q[0], k[0], cos, sin, 1),
    }
    assert [why for why, args in refused.items() if ops.supports_rotary(*args)] == []

"""The kernels of decoding against the same in float64."""

import pytest
import torch
from accuracy import INTERPRETED, assert_accurate

from sloth_plugins.patches.kernels.ops.decoding import AddedTerm, add_low_rank, decode_attention, low_rank

pytestmark = pytest.mark.usefixtures("_poisoned")
# The interpreter's product of bf16 is wrong.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)


def attention(q, keys, values, lengths, scale, window, softcap):
    rows = []
    for row, length in enumerate(lengths.tolist()):
        first = 0 if window is None else max(0, length + 1 - window)
        repeat = q.shape[1] // keys.shape[1]
        k, v = (t[row, :, first : length + 1].repeat_interleave(repeat, 0) for t in (keys, values))
        scores = (q[row, :, None] @ k.transpose(1, 2)) * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        rows.append((scores.softmax(-1) @ v)[:, 0])
    return torch.stack(rows)


# (query heads, key heads, features, capacity, tokens before this one of each row, window, softcap)
CASES = [
    (4, 2, 16, 9, (0, 8, 3), None, None),
    (3, 3, 20, 150, (149,), None, None),
    (8, 1, 24, 200, (70, 199), 65, 5.0),
    (6, 2, 16, 70, (2, 69, 30, 11, 5), 8, None),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_over_the_cache(case, dtype):
    n_q, n_k, dim, capacity, before, window, softcap = case
    lengths = torch.tensor(before)
    q = torch.randn(len(before), n_q, dim + 3).to(dtype)[..., :dim]
    # As the decoder keeps them, and what lies beyond a row's tokens is nobody's.
    keys, values = (torch.randn(len(before), n_k, capacity, dim).to(dtype) for _ in range(2))
    for row, length in enumerate(before):
        keys[row, :, length + 1 :] = torch.nan
        values[row, :, length + 1 :] = torch.nan
    found = decode_attention(q, keys, values, lengths, 0.3, window, softcap)
    own = attention(q, keys, values, lengths, 0.3, window, softcap)
    truth = attention(q.double(), keys.double(), values.double(), lengths, 0.3, window, softcap)
    assert_accurate("attention", found, own, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("adapter", [torch.float32, None], ids=["fp32 adapters", "adapters of that dtype"])
def test_low_rank_terms(dtype, rows, adapter):
    adapter = adapter or dtype
    k, ranks, outputs = 1100, (3, 0, 40), (70, 5, 129)
    x = torch.randn(rows, k + 5).to(dtype)[:, :k]
    a, scales = torch.randn(sum(ranks), k).to(adapter), torch.rand(sum(ranks))
    bs = [torch.randn(n, r).to(adapter) for n, r in zip(outputs, ranks, strict=True)]
    # Two of three outputs have a term; one is a view.
    ys = [torch.randn(rows, n + 2).to(dtype)[:, :n] for n in outputs]
    residual = torch.randn(rows, outputs[2]).to(dtype)
    cols = [slice(0, 3), slice(3, 3), slice(3, 43)]

    def plain(kind, y, b, at, beside):
        # As peft has it: the product in the adapters' dtype, the sum rounded once.
        wide = torch.promote_types(kind, adapter) if kind is not torch.float64 else kind
        term = (x.to(wide) @ a[at].to(wide).t() * scales[at].to(wide)) @ b.to(wide).t()
        made = (y.to(wide) + term).to(kind)
        return made if beside is None else made + beside.to(kind)

    chosen = [(ys[i], bs[i], cols[i]) for i in (0, 2)]
    expected = [[plain(kind, *each, None) for kind in (dtype, torch.float64)] for each in chosen]
    last = [plain(kind, ys[2].clone(), bs[2], cols[2], residual) for kind in (dtype, torch.float64)]
    alone = ys[2].clone()
    xa = low_rank(x, a, scales)
    assert xa.dtype is torch.float32
    add_low_rank(xa, [AddedTerm(*each) for each in chosen])
    for each, (own, truth) in zip(chosen, expected, strict=True):
        assert_accurate("y", each[0], own, truth)
    add_low_rank(xa, [AddedTerm(alone, bs[2], cols[2])], residual)
    assert_accurate("y with residual", alone, *last)

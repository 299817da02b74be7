"""Low-rank terms and rotary embedding of q, k and v in one pass, against the separate steps in float64."""

import pytest
import torch
from accuracy import INTERPRETED, assert_accurate, wide

from sloth_plugins.patches.kernels.ops.lora_glu import LowRank
from sloth_plugins.patches.kernels.ops.lora_rope import lora_rope, supports_lora_rope

pytestmark = pytest.mark.usefixtures("_poisoned")
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
# (rows, length, heads of q, k and v, their features, rank, whether each has ranks of its own)
CASES = [
    (2, 5, (3, 1, 1), 16, 4, False),
    (1, 70, (2, 2, 2), 24, 5, True),
    (3, 33, (4, 0, 0), 32, 16, False),
    (2, 9, (0, 2, 0), 16, 1, False),
    (1, 17, (1, 1, 1), 64, 20, True),
    (2, 7, (2, 1, 1), 16, 0, False),
]


def term_of(n_rows, heads, dim, rank, separate, dtype):
    if not rank:
        return None
    if not separate:
        return LowRank(wide(n_rows, rank, dtype), wide(sum(heads) * dim, rank, dtype))
    blocks = [torch.randn(n * dim, rank).to(dtype) for n in heads]
    return LowRank(wide(n_rows, 3 * rank, dtype), torch.block_diag(*blocks))


@pytest.mark.parametrize("tables", ["one row's", "each row's", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, dtype, tables):
    rows, length, heads, dim, rank, separate = case
    y = wide(rows * length, sum(heads) * dim, dtype)
    term = term_of(rows * length, heads, dim, rank, separate, dtype)
    shape = (rows if tables == "each row's" else 1, length, dim)
    cos, sin = (torch.randn(shape).to(torch.float32 if tables == "fp32" else dtype) for _ in range(2))
    assert supports_lora_rope(cos, sin, dim)

    def plain(kind):
        whole = y.to(kind)
        if term is not None:
            whole = whole + term.x.to(kind) @ term.b.to(kind).t()
        split = whole.view(rows, length, -1, dim)
        q_and_k, v = split[:, :, : heads[0] + heads[1]], split[:, :, heads[0] + heads[1] :]
        c, s = (t.unsqueeze(2).to(torch.promote_types(kind, t.dtype)) for t in (cos, sin))
        halves = torch.cat([-q_and_k[..., dim // 2 :], q_and_k[..., : dim // 2]], -1)
        turned = (q_and_k * c + halves * s).to(kind)
        return torch.cat([turned, v], 2).reshape(rows * length, -1)

    own, truth, before = plain(dtype), plain(torch.float64), y.clone()
    lora_rope(y, term, cos, sin, heads, separate=separate)
    assert_accurate("turned", y, own, truth)
    if not rank and heads[2]:
        values = slice(-heads[2] * dim, None)
        assert torch.equal(y[:, values], before[:, values])


def test_what_tables_are_not_for_it():
    cos = torch.randn(1, 4, 16)
    assert not supports_lora_rope(cos, cos, 32)
    assert not supports_lora_rope(cos, torch.randn(1, 16, 4).transpose(1, 2), 16)
    assert not supports_lora_rope(cos[..., :8], cos[..., :8], 8)

"""Residual, product and low-rank term in one pass, against the separate steps in float64."""

import pytest
import torch
from accuracy import INTERPRETED, assert_accurate, wide

from sloth_plugins.patches.kernels.ops.lora_glu import LowRank
from sloth_plugins.patches.kernels.ops.lora_residual import lora_residual

pytestmark = pytest.mark.usefixtures("_poisoned")
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
# (tokens, features, rank)
CASES = [(3, 7, 4), (70, 130, 1), (33, 40, 20), (1, 129, 16), (65, 64, 5)]


WAYS = [(d, d, place) for d in DTYPES for place in ("y", "residual", "new")]
WAYS += [(torch.float16, torch.float32, place) for place in ("residual", "new")]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, way):
    tokens, features, rank = case
    dtype, stream, place = way
    y, residual = wide(tokens, features, dtype), wide(tokens, features, stream)
    term = LowRank(wide(tokens, rank, dtype), wide(features, rank, dtype))

    def plain(kind):
        return residual.to(kind) + (y.to(kind) + term.x.to(kind) @ term.b.to(kind).t())

    own = residual + (y + term.x @ term.b.t())
    truth = plain(torch.float64)
    out = {"y": y, "residual": residual, "new": torch.full_like(residual, torch.nan)}[place]
    lora_residual(y, term, residual, out)
    assert_accurate("sum", out, own, truth)


@pytest.mark.skipif(INTERPRETED, reason="its bf16 is not the hardware's")
def test_a_small_term_is_not_lost_in_a_large_residual():
    # Half of a unit of 4 in bf16 is 2**-7: alone the term would be rounded away, with y it decides every other time.
    y = torch.rand(64, 512).bfloat16() * 2**-4
    residual = torch.full((64, 512), 4.0).bfloat16()
    term = LowRank(torch.ones(64, 1).bfloat16(), torch.full((512, 1), 2**-9).bfloat16())
    out = torch.empty_like(residual)
    lora_residual(y, term, residual, out)
    moved = (out.double() - (residual + y).double()).mean()
    assert 0.5 * 2**-9 < moved < 1.5 * 2**-9

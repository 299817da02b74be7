"""Matrices copied in one launch, to the bit what torch's own copies give."""

import itertools

import pytest
import torch
from accuracy import INTERPRETED

from sloth_plugins.patches.kernels.ops.copies import BLOCK, Copies

pytestmark = pytest.mark.usefixtures("_poisoned")
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(16, 300), (1, 1), (3, 2 * BLOCK + 5), (BLOCK + 1, 1), (257, 8)]


def wide(rows, cols, dtype, extra):
    """A matrix between whose rows other memory lies, and that memory with it."""
    whole = torch.randn(rows, cols + extra).to(dtype)
    return whole, whole[:, :cols]


@pytest.mark.parametrize(("source", "target"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_all_are_copied_and_nothing_else(source, target):
    pairs = [(wide(*shape, source, i % 3), wide(*shape, target, (i + 1) % 3)) for i, shape in enumerate(SHAPES)]
    expected = [(given.to(target), whole.clone()) for (_, given), (whole, _) in pairs]
    copies = Copies([given for (_, given), _ in pairs], [to for _, (_, to) in pairs])
    assert (copies.table is not None) is INTERPRETED
    for _ in range(2):
        copies.run()
        for (copy, before), (_, (whole, to)) in zip(expected, pairs, strict=True):
            assert torch.equal(to, copy)
            assert torch.equal(whole[:, to.shape[1] :], before[:, to.shape[1] :])
        # What comes next is what the sources hold then.
        for ((_, given), _), i in zip(pairs, range(len(pairs)), strict=True):
            given.mul_(-2.0)
            expected[i] = given.to(target), expected[i][1]


@pytest.mark.parametrize("how", ["dtypes of sources", "dtypes of targets", "strides"])
def test_what_the_kernel_does_not_take_torch_copies(how):
    sources, targets = [torch.randn(5, 6) for _ in range(2)], [torch.empty(5, 6) for _ in range(2)]
    if how == "dtypes of sources":
        sources[1] = sources[1].half()
    elif how == "dtypes of targets":
        targets[1] = targets[1].half()
    else:
        targets[1] = torch.empty(6, 5).t()
    copies = Copies(sources, targets)
    assert copies.table is None
    copies.run()
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source.to(target.dtype), target)


def test_nothing_to_copy():
    Copies([], []).run()

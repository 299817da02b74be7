"""Kernels with low-rank terms on a GPU, for ranks and shapes that take other instructions than the small ones do."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # the tests of small shapes live there

import test_lora_glu as small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("_on_gpu"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (tokens, features, ranks of gate, up and down)
CASES = [(700, 1000, 64, 64, 64), (513, 2051, 32, 8, 64), (300, 700, 3, 0, 33), (4096, 14336, 16, 16, 16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_values_and_gradients(case, dtype, activation):
    small.test_values_and_gradients(case, dtype, activation, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients_of_the_factors_on_the_way(case, dtype, wanted):
    small.test_gradients_of_the_factors_on_the_way(case, dtype, wanted)

"""Dequantised four-bit weights, bit for bit those of bitsandbytes on the CPU."""

import random
import types

import pytest
import torch
from accuracy import INTERPRETED

from sloth_plugins.patches.kernels import reference_four_bit
from sloth_plugins.patches.kernels.four_bit_weight import FourBit, FourBitRows, of_quant_state
from sloth_plugins.patches.kernels.ops.four_bit import dequantize_four_bit, dequantize_four_bit_rows, supports_four_bit

functional = pytest.importorskip("bitsandbytes.functional")

# Triton's interpreter truncates where it casts to bf16; tests/gpu holds the kernel to these.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
NAN = float("nan")
# Words in whole tiles, in rows shorter and longer than a tile; rows no word fits into; odd ones; one row; one column.
SHAPES = [(8, 64), (3, 4096), (2, 4096 + 8), (5, 36), (7, 33), (1, 8192 + 1), (65, 1), (1, 3), (3, 127)]


def quantized(weight, quant_type="nf4", blocksize=64, nested=False, storage=torch.uint8):
    return functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )


@pytest.fixture(autouse=True)
def _eager():
    """bitsandbytes compiles its fallbacks, anew for each shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def theirs(packed, state):
    """bitsandbytes' values [rows, cols].

    Asked for as one row: where cols is even and no multiple of the blocksize, its CPU kernel (not the one for CUDA)
    starts a new block with every row, which is not how the weight was quantised.
    """
    n = state.shape.numel()
    return functional.dequantize_4bit(packed, changed(state, shape=torch.Size([1, n]))).view(state.shape)


def changed(state, **attributes):
    """A state with other attributes."""
    fields = {name: getattr(state, name) for name in vars(state)}
    return types.SimpleNamespace(**fields | attributes)


def known(packed, state):
    weight = of_quant_state(packed, state)
    assert isinstance(weight, FourBit), weight
    return weight


def view(shape, dtype, beyond=0, before=0):
    """Rows of a wider buffer of NaN, and the buffer; the first starts `before` elements into it."""
    rows, cols = shape
    flat = torch.full((before + rows * (cols + beyond),), NAN, dtype=dtype)
    return flat[before:].view(rows, cols + beyond)[:, :cols], flat


def same(got, expected):
    """Equal values, and NaN where NaN is expected."""
    return torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


def assert_exact(packed, state, dtype, beyond=0, before=0):
    expected = theirs(packed, state).to(dtype)
    out, buffer = view(expected.shape, dtype, beyond, before)
    weight = known(packed, state)
    assert supports_four_bit(weight, out)
    dequantize_four_bit(weight, out)
    assert same(out, expected)
    out.fill_(NAN)
    assert buffer.isnan().all(), "written beyond the rows"


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, quant_type, nested):
    packed, state = quantized(torch.randn(shape), quant_type, nested=nested)
    for beyond, before in ((0, 0), (8, 0), (1, 0), (16, 3)):
        assert_exact(packed, state, torch.float32, beyond, before)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_dtypes(nested, dtype, out_dtype):
    """The product is rounded to the weight's dtype first, and only then to out's."""
    packed, state = quantized((torch.randn(64, 80) * 0.02).to(dtype), nested=nested)
    assert state.dtype is dtype
    assert_exact(packed, state, out_dtype, beyond=8)


@pytest.mark.parametrize("shape", [(3, 9000), (40, 33)], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_blocksizes(blocksize, nested, shape):
    packed, state = quantized(torch.randn(shape), blocksize=blocksize, nested=nested)
    assert_exact(packed, state, torch.float32)
    assert_exact(packed, state, torch.float16, beyond=5)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("cols", "heights"), [(64, (3, 1)), (72, (5, 2, 4)), (4096 + 8, (2, 1))])
def test_rows_of_several_weights(cols, heights, quant_type, nested):
    out_dtype = DTYPES[-1]
    made = [quantized(torch.randn(rows, cols) * (i + 1), quant_type, nested=nested) for i, rows in enumerate(heights)]
    weights = FourBitRows.of([known(*each) for each in made])
    assert weights is not None
    assert weights.rows == sum(heights)
    out = torch.full((weights.rows, cols), NAN, dtype=out_dtype)
    dequantize_four_bit_rows(weights, out)
    assert same(out, torch.cat([theirs(*each) for each in made]).to(out_dtype))


def test_rows_that_do_not_go_together():
    one, other = known(*quantized(torch.randn(4, 64))), known(*quantized(torch.randn(4, 128)))
    assert FourBitRows.of([one, one]) is not None
    assert FourBitRows.of([one, other]) is None
    assert FourBitRows.of([one, known(*quantized(torch.randn(4, 64), nested=True))]) is None
    assert FourBitRows.of([one, known(*quantized(torch.randn(4, 64), blocksize=128))]) is None
    assert FourBitRows.of([one, known(*quantized(torch.randn(4, 64).half()))]) is None
    assert FourBitRows.of([one, torch.randn(4, 64)]) is None
    assert FourBitRows.of([known(*quantized(torch.randn(4, 36)))] * 2) is None


@pytest.mark.parametrize("shape", [(300, 128), (301, 127)], ids=str)
def test_more_blocks_than_one_scale_of_scales(shape):
    """300 * 128 / 64 blocks are more than the 256 that share a nested absmax, which ends within a row."""
    packed, state = quantized(torch.randn(shape), nested=True)
    assert state.state2.absmax.numel() > 1
    assert_exact(packed, state, torch.float32, beyond=8)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_storage(storage):
    packed, state = quantized(torch.randn(16, 72), storage=storage)
    assert packed.dtype is storage
    assert known(packed, state).packed.dtype is torch.uint8
    assert_exact(packed, state, torch.float32)


def test_bytes_that_start_between_words():
    packed, state = quantized(torch.randn(16, 72))
    shifted = torch.cat((torch.zeros(1, 1, dtype=torch.uint8), packed))[1:]
    assert shifted.data_ptr() % 4
    assert_exact(shifted, state, torch.float32)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("value", [0.0, -0.5, 3e38, 65504.0, 1e-20])
def test_constant_blocks(value, nested):
    weight = torch.randn(6, 128)
    weight[1:3] = value
    packed, state = quantized(weight, nested=nested)
    for dtype in DTYPES:
        assert_exact(packed, state, dtype, beyond=8)


@pytest.mark.parametrize("absmax", [float("inf"), NAN, -1.0, 0.0])
def test_any_scale(absmax):
    packed, state = quantized(torch.randn(6, 128))
    state.absmax[3] = absmax
    assert_exact(packed, state, torch.float32)


@pytest.mark.parametrize("seed", range(12))
def test_random_states(seed):
    """Any bytes, scales and tables of scales, not only those that a quantised weight has."""
    draw = random.Random(seed)
    for _ in range(4):
        shape = draw.randint(1, 70), draw.choice([8, 16, 24, 64, 128]) * draw.randint(1, 9) + draw.choice([0, 0, 1, 4])
        blocksize, nested = draw.choice([32, 64, 128, 256, 512]), draw.random() < 0.5
        packed, state = quantized(torch.randn(shape), draw.choice(["nf4", "fp4"]), blocksize, nested)
        packed.random_(0, 256)
        state.dtype = draw.choice(DTYPES)
        if nested:
            state.absmax.random_(0, 256)
            state.state2.absmax.normal_()
        else:
            state.absmax.normal_().exp_()
        assert_exact(packed, state, draw.choice(DTYPES), draw.choice([0, 1, 8, 24]), draw.choice([0, 0, 5]))


def test_the_reference_takes_any_strides():
    packed, state = quantized(torch.randn(24, 40), nested=True)
    out = torch.empty(40, 24).t()
    assert not supports_four_bit(known(packed, state), out)
    with pytest.raises(TypeError, match="four_bit"):
        dequantize_four_bit(known(packed, state), out)
    reference_four_bit.dequantize(known(packed, state), out)
    assert torch.equal(out, theirs(packed, state))


def test_what_is_not_supported():
    packed, state = quantized(torch.randn(24, 40))
    weight = known(packed, state)
    for out in (
        torch.empty(40, 24),
        torch.empty(24, 40, dtype=torch.float64),
        torch.empty(24, 40, device="meta"),
        torch.empty(24, 1).expand(24, 40),
        torch.empty(40).expand(24, 40),
        torch.empty(24, 40, requires_grad=True),
    ):
        assert not supports_four_bit(weight, out)


CHANGES = {
    "quant_type is 'int4'": {"quant_type": "int4"},
    "quant_type is None": {"quant_type": None},
    "blocksize is 96": {"blocksize": 96},
    "blocksize is None": {"blocksize": None},
    "dtype of the weight": {"dtype": torch.float64},
    "shape of the weight is None": {"shape": None},
    "shape of the weight is (960,)": {"shape": torch.Size([960])},
    "packed bytes do not hold": {"shape": torch.Size([25, 40])},
    "absmax has 15 elements of torch.float64": {"absmax": torch.ones(15, dtype=torch.float64)},
    "absmax has 14": {"absmax": torch.ones(14, dtype=torch.uint8)},
    "absmax is on meta": {"absmax": torch.ones(15, dtype=torch.uint8, device="meta")},
    "absmax is not contiguous": {"absmax": torch.ones(30, dtype=torch.uint8)[::2]},
    "absmax is no plain tensor but NoneType": {"absmax": None},
    "code has 256": {"code": torch.ones(256)},
    "offset is no plain tensor but float": {"offset": 0.5},
    "CPU kernel": {"packing_format_for_cpu": True},
}


@pytest.mark.parametrize("reason", CHANGES)
def test_states_that_are_not_known(reason):
    packed, state = quantized(torch.randn(24, 40), nested=True)
    found = of_quant_state(packed, changed(state, **CHANGES[reason]))
    assert isinstance(found, str)
    assert reason in found
    assert "\n" not in found


NESTED_CHANGES = {
    "more than twice": {"state2": types.SimpleNamespace()},
    "quantised from torch.float16": {"dtype": torch.float16},
    "blocksize of absmax is 0": {"blocksize": 0},
    "nested absmax has 2": {"absmax": torch.ones(2)},
    "nested code has 16": {"code": torch.ones(16)},
}


@pytest.mark.parametrize("reason", NESTED_CHANGES)
def test_double_quantised_states_that_are_not_known(reason):
    packed, state = quantized(torch.randn(24, 40), nested=True)
    found = of_quant_state(packed, changed(state, state2=changed(state.state2, **NESTED_CHANGES[reason])))
    assert isinstance(found, str)
    assert reason in found


def test_packed_weights_that_are_not_known():
    packed, state = quantized(torch.randn(24, 40))
    assert "not quantised" in of_quant_state(packed, None)
    assert "quant_type is None" in of_quant_state(packed, object())
    assert "transposed" in of_quant_state(packed.t().contiguous(), state)
    assert "contiguous" in of_quant_state(packed.repeat(1, 2)[:, :1], state)
    assert "do not hold" in of_quant_state(packed[1:], state)
    assert "plain tensor" in of_quant_state(None, state)


def test_a_weight_of_bitsandbytes_own_layer():
    layer = pytest.importorskip("bitsandbytes").nn.Linear4bit(64, 48, bias=False, quant_type="nf4").to("cpu")
    weight = known(layer.weight.data, layer.weight.quant_state)
    assert weight.packed.data_ptr() == layer.weight.data_ptr()
    assert weight.shape == (48, 64)
    with pytest.raises(AttributeError):
        weight.blocksize = 128

"""Dequantised four-bit weights on a GPU, bit for bit those of bitsandbytes' CUDA kernels."""

import copy

import pytest
import torch

from sloth_plugins.patches.kernels import dispatch, reference_four_bit
from sloth_plugins.patches.kernels.four_bit_weight import FourBit, of_quant_state
from sloth_plugins.patches.kernels.ops.four_bit import dequantize_four_bit, supports_four_bit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

functional = pytest.importorskip("bitsandbytes.functional")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(14336, 4096), (4097, 333), (896, 4864), (1024, 2880), (333, 4100), (1, 7), (5, 1), (130, 8192 + 8)]


@pytest.fixture(autouse=True)
def _on_gpu():
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield
    torch.cuda.empty_cache()


def quantized(weight, quant_type="nf4", blocksize=64, nested=False, storage=torch.uint8):
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    weight = of_quant_state(packed, state)
    assert isinstance(weight, FourBit), weight
    return weight, packed, state


def assert_exact(weight, packed, state, dtype, beyond=0):
    expected = functional.dequantize_4bit(packed, state).to(dtype)
    rows, cols = expected.shape
    buffer = torch.full((rows, cols + beyond), float("nan"), dtype=dtype)
    out = buffer[:, :cols]
    assert dispatch.backend_for(out) == "triton"
    assert supports_four_bit(weight, out)
    dequantize_four_bit(weight, out)
    assert torch.equal(out, expected)
    assert buffer[:, cols:].isnan().all()


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, quant_type, nested):
    made = quantized((torch.randn(shape) * 0.02).bfloat16(), quant_type, nested=nested)
    for beyond in (0, 8, 64, 1):
        assert_exact(*made, torch.bfloat16, beyond)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_dtypes(nested, dtype, out_dtype):
    for shape in ((1024, 4096), (333, 333)):
        made = quantized((torch.randn(shape) * 0.02).to(dtype), nested=nested)
        assert_exact(*made, out_dtype)
        assert_exact(*made, out_dtype, beyond=8)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("blocksize", [64, 128, 256, 512, 1024, 2048, 4096])
def test_blocksizes(blocksize, nested):
    for shape in ((1024, 4096), (333, 4100), (57, 333)):
        assert_exact(*quantized(torch.randn(shape).bfloat16(), blocksize=blocksize, nested=nested), torch.bfloat16)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_storage(storage):
    assert_exact(*quantized(torch.randn(512, 1024).bfloat16(), nested=True, storage=storage), torch.bfloat16)


def test_any_bytes_and_scales():
    """In double-quantised weights the two roundings of a scale show."""
    weight, packed, state = quantized(torch.randn(2048, 4096).bfloat16(), nested=True)
    packed.random_(0, 256)
    state.absmax.random_(0, 256)
    state.state2.absmax.normal_()
    state.dtype = torch.float32
    weight = of_quant_state(packed, state)
    assert_exact(weight, packed, state, torch.float32)
    out = torch.empty(2048, 4096)
    reference_four_bit.dequantize(weight, out)
    assert torch.equal(out, functional.dequantize_4bit(packed, state))


def test_nothing_waits_for_the_device():
    _, packed, state = quantized(torch.randn(512, 1024).bfloat16(), nested=True)
    out = torch.empty(512, 1024, dtype=torch.bfloat16)
    dequantize_four_bit(of_quant_state(packed, state), out)  # compiles
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dequantize_four_bit(of_quant_state(packed, state), out)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_parts_on_two_devices_are_not_known():
    _, packed, state = quantized(torch.randn(64, 64), nested=True)
    moved = copy.copy(state)
    moved.offset = state.offset.cpu()
    assert "offset is on cpu" in of_quant_state(packed, moved)

"""A weight as bitsandbytes packs it into four bits: its parts by name, checked once, without bitsandbytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

QUANT_TYPES = ("nf4", "fp4")
# The only ones that bitsandbytes' own dequantize_4bit takes.
BLOCKSIZES = frozenset({32, 64, 128, 256, 512, 1024, 2048, 4096})
DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FourBit:
    """The parts of a weight [rows, cols]: element i, counted along the rows, is code[nibble i] * scale[i // blocksize].

    `packed` (uint8, contiguous) has two elements to the byte, the earlier one in the high nibble; `code` is fp32 [16].
    The scales are `absmax`, fp32 [blocks]. Double-quantised, `absmax` is uint8 [blocks] and the scale of block b is
    nested_code[absmax[b]] * nested_absmax[b // nested_blocksize] + offset, with `nested_code` fp32 [256],
    `nested_absmax` fp32 and `offset` fp32 of no dimension; all three are None otherwise, and `nested_blocksize` is 0.
    `dtype` is what bitsandbytes rounds the product to. All tensors are on one device; nothing is read from them here.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    blocksize: int
    shape: tuple[int, int]
    dtype: torch.dtype
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    nested_blocksize: int = 0
    offset: torch.Tensor | None = None


class FourBitRows:
    """Weights of equal columns and blocks, whose rows lie below each other when they are unpacked.

    `table` [weights, 7] is int64 on their device: the addresses of packed, absmax, code, nested_absmax, nested_code and
    offset (those of `code` for what is not there), and the rows up to the weight's end.
    """

    __slots__ = ("rows", "table", "weights")

    def __init__(self, weights: Sequence[FourBit]) -> None:
        self.weights = tuple(weights)
        self.rows = 0
        table = []
        for w in weights:
            self.rows += w.shape[0]
            parts = (w.packed, w.absmax, w.code, w.nested_absmax, w.nested_code, w.offset)
            table.append([*((w.code if part is None else part).data_ptr() for part in parts), self.rows])
        self.table = torch.tensor(table, dtype=torch.int64).to(weights[0].packed.device)

    @classmethod
    def of(cls, weights: Sequence[object]) -> "FourBitRows | None":
        """These weights, if all are of one kind and their rows are whole words of eight elements; else None."""
        four_bit = [w for w in weights if isinstance(w, FourBit)]
        kinds = {(w.shape[1], w.blocksize, w.nested_blocksize, w.dtype, w.packed.device) for w in four_bit}
        aligned = all(w.shape[1] % 8 == 0 and w.packed.data_ptr() % 16 == 0 for w in four_bit)
        return cls(four_bit) if len(four_bit) == len(weights) and len(kinds) == 1 and aligned else None


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _attributes(state: Any, *names: str) -> list[Any]:
    return [getattr(state, name, None) for name in names]


def _unlike(name: str, tensor: Any, dtype: torch.dtype, numel: int, device: torch.device) -> str | None:
    """Why this is not the contiguous tensor that is wanted; None if it is."""
    if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
        return f"{name} is no plain tensor but {type(tensor).__name__}"
    if tensor.dtype is not dtype or tensor.numel() != numel:
        return f"{name} has {tensor.numel()} elements of {tensor.dtype}, not {numel} of {dtype}"
    if tensor.device != device:
        return f"{name} is on {tensor.device}, the weight on {device}"
    return None if tensor.is_contiguous() else f"{name} is not contiguous"


def of_quant_state(data: torch.Tensor, quant_state: Any) -> FourBit | str:
    """The weight that bitsandbytes keeps as `weight.data` and `weight.quant_state`, or in a line why we do not know it.

    data is the packed tensor [n, 1] in whatever `quant_storage` was asked for; `quant_state` needs only the attributes
    of bitsandbytes' QuantState. The result shares all memory. Does not raise, and does not wait for the device.
    """
    if quant_state is None:
        return "the weight has no quant_state: it is not quantised yet"
    if getattr(quant_state, "packing_format_for_cpu", False):
        return "the weight is packed for bitsandbytes' own CPU kernel"
    quant_type, blocksize, dtype, shape, absmax, code = _attributes(
        quant_state, "quant_type", "blocksize", "dtype", "shape", "absmax", "code"
    )
    if quant_type not in QUANT_TYPES:
        return f"quant_type is {quant_type!r}, not nf4 or fp4"
    if blocksize not in BLOCKSIZES:
        return f"blocksize is {blocksize!r}, which bitsandbytes does not have"
    if dtype not in DTYPES:
        return f"the dtype of the weight is {dtype}, not fp32, fp16 or bf16"
    if shape is None or len(shape) != 2 or not shape[0] * shape[1]:
        return f"the shape of the weight is {None if shape is None else tuple(shape)}, not [rows, cols]"
    if type(data) is not torch.Tensor and type(data) is not torch.nn.Parameter:
        return f"the packed weight is no plain tensor but {type(data).__name__}"
    if not data.dim() or not data.is_contiguous():
        return "the packed weight is not contiguous"
    if data.shape[0] == 1:
        return "the packed weight is a row, which bitsandbytes takes for the transposed weight"
    n = shape[0] * shape[1]
    if data.numel() * data.element_size() != _cdiv(n, 2):
        return f"{data.numel() * data.element_size()} packed bytes do not hold {shape[0]} x {shape[1]} elements"
    blocks, state2 = _cdiv(n, blocksize), getattr(quant_state, "state2", None)
    reason = _unlike("absmax", absmax, torch.float32 if state2 is None else torch.uint8, blocks, data.device)
    reason = reason or _unlike("code", code, torch.float32, 16, data.device)
    if reason:
        return reason
    nested = {} if state2 is None else _nested(quant_state, state2, blocks, data.device)
    if isinstance(nested, str):
        return nested
    packed = data.detach().view(torch.uint8).view(-1)
    return FourBit(
        packed=packed, absmax=absmax, code=code, blocksize=blocksize, shape=(shape[0], shape[1]), dtype=dtype, **nested
    )


def _nested(quant_state: Any, state2: Any, blocks: int, device: torch.device) -> dict[str, Any] | str:
    """What a double-quantised weight has besides, or why it is not known."""
    absmax, code, blocksize, dtype = _attributes(state2, "absmax", "code", "blocksize", "dtype")
    if getattr(state2, "state2", None) is not None:
        return "absmax is quantised more than twice"
    if dtype is not torch.float32:
        return f"absmax was quantised from {dtype}, not fp32"
    if not isinstance(blocksize, int) or blocksize < 1:
        return f"the blocksize of absmax is {blocksize!r}"
    offset = getattr(quant_state, "offset", None)
    reason = (
        _unlike("nested absmax", absmax, torch.float32, _cdiv(blocks, blocksize), device)
        or _unlike("nested code", code, torch.float32, 256, device)
        or _unlike("offset", offset, torch.float32, 1, device)
    )
    return reason or {
        "nested_absmax": absmax,
        "nested_code": code,
        "nested_blocksize": blocksize,
        "offset": offset,
    }

"""bitsandbytes weights, 4-bit and 8-bit, back to fp32: from a checkpoint's parts or from a live parameter."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

FOUR_BIT_STATE = ".quant_state.bitsandbytes__"
FOUR_BIT_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One quantised weight of a checkpoint: the names that hold it, and its shape when dequantised."""

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]

    @classmethod
    def read(cls, names: tuple[str, ...], raw: Callable[[str], torch.Tensor]) -> Packed:
        """What the stored `names` (the weight first) hold; `raw` reads a stored tensor."""
        shape = tuple(raw(names[0]).shape)
        for name in names:
            if FOUR_BIT_STATE in name:
                shape = tuple(json.loads(bytes(raw(name).tolist()))["shape"])
        return cls(name=names[0], parts=names[1:], shape=shape)

    def dequantise(self, raw: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The weight in fp32, on the CPU."""
        from bitsandbytes.functional import QuantState

        weight = raw(self.name)
        if weight.dtype == torch.int8:
            scale = next(part for part in self.parts if part.endswith(".SCB"))
            return from_eight_bit(weight, raw(scale))
        state = {part.removeprefix(f"{self.name}."): raw(part) for part in self.parts}
        return from_four_bit(weight, QuantState.from_dict(state, torch.device("cpu")))


def packed_names(stored: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The quantised weights among the stored names: each with all names that hold it, its own first."""
    names = set(stored)
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        if FOUR_BIT_STATE in name:
            weight = name.split(FOUR_BIT_STATE)[0]
            parts = [f"{weight}{part}" for part in FOUR_BIT_PARTS]
            found[weight] = (weight, name, *(part for part in parts if part in names))
        elif name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            form = f"{module}.weight_format"
            found[f"{module}.weight"] = (f"{module}.weight", name, *([form] if form in names else []))
    return found


def from_four_bit(data: torch.Tensor, state: Any) -> torch.Tensor:
    """NF4 or FP4 data with its QuantState: code times block scale in fp32, where training rounds to 16 bits."""
    from bitsandbytes.functional import dequantize_4bit

    exact = copy.copy(state)
    exact.dtype = torch.float32
    result: torch.Tensor = dequantize_4bit(data, exact)
    return result.reshape(tuple(state.shape))


def from_eight_bit(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LLM.int8() rows: int8 values times the row's largest magnitude, over 127."""
    return data.to(torch.float32).mul_(scale.to(torch.float32).reshape(-1, 1) / 127)


def shapes_without_parts(
    stored: Mapping[str, tuple[int, ...]], packed: Mapping[str, Packed]
) -> dict[str, tuple[int, ...]]:
    """The stored names with the parts of quantised weights left out, and the shapes of those dequantised."""
    parts = {part for weight in packed.values() for part in weight.parts}
    return {
        name: packed[name].shape if name in packed else shape
        for name, shape in stored.items()
        if name in packed or name not in parts
    }

"""How a merged tensor is stored: rounded once to 16 bits, or quantised from there by bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import SlothError, check_known
from .changes import Base
from .naming import checkpoint_names, skeleton

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# As transformers' own examples of QLoRA have it.
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# 4 bits, one fp32 scale for 64 values and, with double quantisation, less: at most this share of a byte each.
FOUR_BIT_BYTES = 0.5 + 4 / 64


class Rounded:
    """Every floating-point tensor in one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.quantization: dict[str, Any] | None = None
        """For the config of what is written."""

    def like(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor on the meta device, of the size of what is stored."""
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def stored(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is stored for a tensor, by name. Raises SlothError for values that are not finite."""
        if not tensor.is_floating_point():
            return {name: tensor}
        rounded = tensor.to(self.dtype).contiguous()
        if not _is_finite(rounded):
            whole = _is_finite(tensor)
            raise SlothError(
                f"{name} has values beyond {self.dtype}; choose dtype bfloat16"
                if whole
                else f"{name} holds NaN or infinite values: a file is damaged, or training diverged"
            )
        return {name: rounded}


class FourBit(Rounded):
    """The weights of linear layers in 4 bits as bitsandbytes stores them, the rest rounded."""

    def __init__(
        self,
        base: Base,
        config: Any,
        dtype: torch.dtype,
        *,
        skip: Sequence[str] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`skip` are the paths of modules that stay as they are, else those of the base; quantised on `device`."""
        super().__init__(dtype)
        linear, head = _linear_layers(config)
        if skip is None:
            self._chosen = (base.quantised or linear.keys() - head) & linear.keys()
            kept = sorted(layer for name, layer in linear.items() if name not in self._chosen)
        else:
            self._chosen = {name for name, layer in linear.items() if layer not in skip}
            kept = list(skip)
        self._device = device or torch.device("cpu")
        known = base.quantization if base.quantization and base.quantization.get("load_in_4bit") else {}
        from transformers import BitsAndBytesConfig

        values = {name: value for name, value in known.items() if name.startswith("bnb_4bit")} or NF4
        values = values | {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": torch.uint8}
        self._config = BitsAndBytesConfig(**values, llm_int8_skip_modules=kept)
        self.quantization = self._config.to_dict()

    def like(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """As `Rounded.like`."""
        if name not in self._chosen:
            return super().like(name, shape)
        return torch.empty(int(torch.Size(shape).numel() * FOUR_BIT_BYTES), dtype=torch.uint8, device="meta")

    def stored(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `Rounded.stored`; the 4 bits are of the rounded values."""
        from bitsandbytes.functional import quantize_4bit

        stored = super().stored(name, tensor)
        if name not in self._chosen:
            return stored
        packed, state = quantize_4bit(
            stored[name].to(self._device),
            blocksize=64,
            compress_statistics=self._config.bnb_4bit_use_double_quant,
            quant_type=self._config.bnb_4bit_quant_type,
        )
        parts = {name: packed} | {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
        return {part: value.cpu() for part, value in parts.items()}


def dtype_of(name: str | torch.dtype | None, config: Any) -> torch.dtype:
    """The dtype that was asked for; else the config's where it has 16 bits, else bfloat16."""
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name is None:
        own = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        return own if own in (torch.bfloat16, torch.float16) else torch.bfloat16
    check_known("dtype", name, DTYPES)
    return DTYPES[name]


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: an extreme is, where any value is, and takes no second tensor to find."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax())


def _linear_layers(config: Any) -> tuple[dict[str, str], set[str]]:
    """The weights of plain linear layers by their names on disk, with the layers' own; and which is the output head."""
    model = skeleton(config)
    output = model.get_output_embeddings()
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is torch.nn.Linear}
    names = checkpoint_names(model, [f"{name}.weight" for name in layers])
    found = {names.get(f"{name}.weight", f"{name}.weight"): name for name in layers}
    return found, {weight for weight, name in found.items() if layers[name] is output}

"""A model in memory, with or without PEFT's adapters: its tensors, and what the active adapters do to them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import SlothError
from .changes import Change, Delta
from .checkpoint import take_quantization
from .naming import checkpoint_names, embeddings_of, ties, untie
from .quantised import from_eight_bit, from_four_bit
from .sources import cached

Read = Callable[[], torch.Tensor]
QUANTISED = ("Params4bit", "Int8Params")
DORA = ("DoraLinearVariant", "DoraEmbeddingVariant")


class LiveModel:
    """The base of a live model, and in `changes` its active adapters', both by names of the checkpoint."""

    def __init__(self, model: Any) -> None:
        model = _unwrapped(model)
        self.name = type(model).__name__
        self.folder = _folder(model)
        self.config = copy.deepcopy(model.config)
        self.quantization = take_quantization(self.config, self.name)
        self.config.architectures = [self.name]
        self.generation_config = getattr(model, "generation_config", None)
        self.tied: dict[str, str] = {}
        self.changes: dict[str, Change] = {}
        self._reads: dict[str, tuple[tuple[int, ...], Read]] = {}
        walked = list(_walk(model, ""))
        names = checkpoint_names(model, [own for own, *_ in walked])
        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        quantised = set()
        seen: dict[int, str] = {}
        for own, tensor, read, change in walked:
            if own in ignored:
                continue
            name = names.get(own, own)
            if change is not None:
                self.changes[name] = change
            first = seen.setdefault(id(tensor), name)
            if first != name:
                self.tied[name] = first
            else:
                self._reads[name] = (_shape(tensor, name), read)
                quantised |= {name} if type(tensor).__name__ in QUANTISED else set()
        self.quantised = frozenset(quantised)
        self._tie_by_values(embeddings_of(model))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As `Weights.shapes`."""
        return {name: shape for name, (shape, _) in self._reads.items()}

    def read(self, name: str) -> torch.Tensor:
        """As `Weights.read`."""
        return self._reads[name][1]()

    def _tie_by_values(self, vocabulary: list[str]) -> None:
        """Have the config say of the embedding and the head what holds of their tensors."""
        if len(vocabulary) < 2:
            return
        embedding, head = vocabulary
        if not ties(self.config):
            if self.tied.pop(head, None) is not None:
                self._reads[head] = self._reads[embedding]  # one tensor, which is two on disk
        elif head in self._reads and embedding in self._reads:
            same = self._reads[head][0] == self._reads[embedding][0]
            if same and torch.equal(self.read(head).float(), self.read(embedding).float()):
                del self._reads[head]
                self.tied[head] = embedding
            else:
                untie(self.config)


def _unwrapped(model: Any) -> Any:
    """The transformers model inside PEFT's, the compiler's and the data-parallel wrappers."""
    from transformers import PreTrainedModel

    _must_be_lora(model)
    while not isinstance(model, PreTrainedModel):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else None
        inner = inner or getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None or inner is model:
            raise SlothError(f"cannot export a {type(model).__name__}: give a folder, or a transformers or PEFT model")
        model = inner
        _must_be_lora(model)
    return model


def _must_be_lora(model: Any) -> None:
    """Some of PEFT's other methods have layers that look like LoRA's, and some have none at all."""
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA":
            raise SlothError(
                f"adapter {name!r} is a {kind} adapter; LoRA (rsLoRA, DoRA) is understood here: "
                "merge it with PEFT's merge_and_unload() and export the model"
            )


def _folder(model: Any) -> Path | None:
    """Where the model was loaded from, if it is there."""
    name = getattr(model.config, "_name_or_path", "")
    try:
        return (Path(name) if Path(name).is_dir() else cached(name)) if name else None
    except SlothError:
        return None


def _walk(module: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor, Read, Change | None]]:
    """(name, parameter or buffer of the base, how to read it, what adapters change) of a module and all in it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        yield from _saved_whole(module, prefix)
    elif isinstance(module, TrainableTokensWrapper):
        yield from _with_tokens(module.token_adapter, prefix)
    elif isinstance(module, BaseTunerLayer):
        yield from _adapted(module, prefix)
    else:
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        buffers = dict(module.named_buffers(recurse=False, remove_duplicate=False))
        own |= {name: buffer for name, buffer in buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in own.items():
            yield f"{prefix}{name}", tensor, _reader(module, tensor, f"{prefix}{name}"), None
        for name, child in module.named_children():
            yield from _walk(child, f"{prefix}{name}.")


def _saved_whole(wrapper: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor, Read, Change | None]]:
    _must_be_on(wrapper, prefix)
    active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    changed = wrapper.modules_to_save[active[0]].state_dict() if active else {}
    for name, tensor, read, change in _walk(wrapper.original_module, prefix):
        value = changed.get(name.removeprefix(prefix))
        yield name, tensor, read, change if value is None else Change(value=value)


def _with_tokens(layer: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor, Read, Change | None]]:
    _must_be_on(layer, prefix)
    merged = set(layer.merged_adapters)
    active = [name for name in layer.active_adapters if name in layer.trainable_tokens_delta and name not in merged]
    rows = [(list(layer.token_indices[name]), layer.trainable_tokens_delta[name]) for name in active]
    for name, tensor, read, change in _walk(layer.base_layer, prefix):
        if name == f"{prefix}weight" and rows:
            change = change or Change()
            change.rows += rows
        yield name, tensor, read, change


def _adapted(layer: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor, Read, Change | None]]:
    from peft.tuners.lora import LoraLayer

    place = prefix.removesuffix(".")
    if not isinstance(layer, LoraLayer) or hasattr(layer, "parameter_name"):
        raise SlothError(
            f"{place} has an adapter of type {type(layer).__name__}, which is not understood; "
            "merge it with PEFT's merge_and_unload() and export the model"
        )
    _must_be_on(layer, prefix)
    # What PEFT has merged is in the base's weight already, and then no other adapter takes part.
    active = [] if layer.merged_adapters else [name for name in layer.active_adapters if name in layer.r]
    deltas = [_delta(layer, name, place) for name in active]
    biases = [(layer.scaling[name], layer.lora_B[name].bias) for name in active if layer.lora_bias.get(name)]
    for name, tensor, read, change in _walk(layer.base_layer, prefix):
        changed = change or Change()
        if name == f"{prefix}weight":
            changed.deltas += deltas
            deltas = []
        elif name == f"{prefix}bias":
            changed.terms += biases
            biases = []
        yield name, tensor, read, changed if changed.deltas or changed.terms else change
    if deltas:
        raise SlothError(
            f"{place} is a {type(layer.base_layer).__name__}, whose LoRA is not understood; use PEFT's merge"
        )
    if biases:
        raise SlothError(f"{place} has an adapter with a bias, and no bias of its own to merge it into")


def _delta(layer: Any, adapter: str, place: str) -> Delta:
    variant = type(layer.lora_variant.get(adapter)).__name__ if adapter in layer.lora_variant else None
    if variant not in (None, *DORA):
        raise SlothError(
            f"{place}: adapter {adapter!r} is a {variant}, which is not understood; use PEFT's merge_and_unload()"
        )
    embedding = adapter in layer.lora_embedding_A
    a = layer.lora_embedding_A[adapter] if embedding else layer.lora_A[adapter].weight
    b = layer.lora_embedding_B[adapter] if embedding else layer.lora_B[adapter].weight
    if a.ndim != 2 or b.ndim != 2:
        raise SlothError(f"{place} is a convolution or the like, whose LoRA is not understood; use PEFT's merge")
    transposed = embedding or bool(getattr(layer, "fan_in_fan_out", False))
    return Delta(
        left=a.T if transposed else b,
        right=b.T if transposed else a,
        scaling=float(layer.scaling[adapter]),
        magnitude=layer.lora_magnitude_vector[adapter].weight if variant in DORA else None,
        norm_dim=0 if transposed else 1,
    )


def _must_be_on(layer: Any, prefix: str) -> None:
    if layer.disable_adapters:
        raise SlothError(f"the adapters of {prefix.removesuffix('.')} are switched off; enable them before exporting")


def _shape(tensor: Any, name: str) -> tuple[int, ...]:
    """The dequantised shape. Raises SlothError where the tensor's values are not all here."""
    if hasattr(tensor, "ds_id") or type(tensor).__name__ == "DTensor":
        raise SlothError(f"{name} is sharded over processes; save the model and export the folder")
    if tensor.is_meta:
        raise SlothError(f"{name} is not in memory (offloaded?); load the model whole, or export its folder")
    state = getattr(tensor, "quant_state", None)
    return tuple(tensor.shape if state is None else state.shape)


def _reader(module: Any, tensor: Any, name: str) -> Read:
    kind = type(tensor).__name__
    if kind == "Params4bit" and tensor.quant_state is not None:
        return lambda: _on_cpu_four_bit(tensor)
    if kind == "Int8Params" and tensor.dtype == torch.int8:
        # bitsandbytes moves the scales from the weight to the layer's state at the first forward.
        return lambda: from_eight_bit(
            tensor.detach().cpu(), (module.state.SCB if tensor.SCB is None else tensor.SCB).detach().cpu()
        )
    if kind not in ("Parameter", "Tensor", "Buffer", "DTensor", *QUANTISED):
        raise SlothError(f"{name} is a {kind}, which cannot be taken back to 16 bits; export the 16-bit base's folder")
    return lambda: tensor.detach().to("cpu", copy=True)


def _on_cpu_four_bit(tensor: Any) -> torch.Tensor:
    data, state = tensor.detach().cpu(), copy.copy(tensor.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        return from_four_bit(*_unpacked(data, state))
    if state.nested:
        state.state2 = copy.copy(state.state2)
    state.to("cpu")
    return from_four_bit(data, state)


def _unpacked(data: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """Out of the order that bitsandbytes gives a weight at its first inference on some CPUs.

    It rounds the scales to bf16 then, for good. Its own way back leaves those of single quantisation in the other
    order, and quantises the others anew.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state.original_nested = False
    data, state = _convert_weight_packed_for_cpu_inverse(data, state)
    state.absmax = state.absmax.T.reshape(-1).to(torch.float32)
    return data, state

"""The adapter of a PEFT model as vLLM takes one: two matrices for each module, no more."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA matrices by vLLM's names, `base_model.model.<module>.lora_A.weight` [r, in] and `...lora_B.weight` [out, r].

    They are copies, and B holds the scaling of its module already: vLLM knows one scaling for all, which is 1 here.
    `rank` is the largest r.
    """

    tensors: dict[str, torch.Tensor]
    rank: int

    @property
    def modules(self) -> list[str]:
        """The modules that it changes, by their names in the model without PEFT."""
        ends = (".lora_A.weight", ".lora_B.weight")
        return [name.removeprefix(PREFIX).removesuffix(ends[0]) for name in self.tensors if name.endswith(ends[0])]


PREFIX = "base_model.model."


def _layers(model: Any, adapter: str) -> Iterator[tuple[str, Any]]:
    """Modules that have a part of an adapter, by name."""
    for name, module in model.named_modules():
        holders = (getattr(module, key, None) for key in ("lora_A", "lora_embedding_A"))
        if any(holder is not None and adapter in holder for holder in holders):
            yield name, module


def active(model: Any) -> str:
    """The name of the one adapter that is trained."""
    (name,) = model.active_adapters
    return str(name)


def largest_rank(model: Any) -> int:
    """Of the matrices of the active adapter."""
    name = active(model)
    return max(int(layer.r[name]) for _, layer in _layers(model, name))


def collect(model: Any) -> Adapter:
    """Copies of the matrices of the active adapter of a model without an `obstacle`."""
    adapter, tensors = active(model), {}
    for name, layer in _layers(model, adapter):
        tensors[f"{name}.lora_A.weight"] = layer.lora_A[adapter].weight.detach().clone()
        tensors[f"{name}.lora_B.weight"] = layer.lora_B[adapter].weight.detach() * float(layer.scaling[adapter])
    return Adapter(tensors, largest_rank(model))


def obstacle(model: Any) -> str | None:
    """Why the weights that are trained are not those of a LoRA adapter that vLLM can take, or None."""
    if not hasattr(model, "peft_config") or not hasattr(model, "active_adapters"):
        return f"{type(model).__name__} has no PEFT adapter"
    names = list(model.active_adapters)
    if len(names) != 1:
        return f"{len(names)} adapters are active"
    config = model.peft_config[names[0]]
    reason = _unknown_setting(config)
    if reason is not None:
        return reason
    matrices: set[int] = set()
    for name, layer in _layers(model, names[0]):
        reason = _unknown_layer(layer, names[0])
        if reason is not None:
            return f"{name.removeprefix(PREFIX)} {reason}"
        matrices |= {id(layer.lora_A[names[0]].weight), id(layer.lora_B[names[0]].weight)}
    if not matrices:
        return f"adapter {names[0]!r} has no LoRA matrices"
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in matrices]
    return f"{others[0]} is trained too" if others else None


def _unknown_setting(config: Any) -> str | None:
    """Which setting of an adapter vLLM does not know, or None."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"the adapter is {kind}, not LoRA"
    if getattr(config, "bias", "none") != "none":
        return f"the adapter has bias={config.bias!r}"
    for name in ("modules_to_save", "layer_replication", "trainable_token_indices", "use_dora"):
        if getattr(config, name, None):
            return f"the adapter has {name}={getattr(config, name)!r}"
    return None


def _unknown_layer(layer: Any, adapter: str) -> str | None:
    """What vLLM does not know of one module's adapter, or None."""
    if adapter in getattr(layer, "lora_embedding_A", {}):
        return "is an embedding with an adapter"
    if adapter in getattr(layer, "lora_variant", {}):
        return f"has an adapter of the kind {type(layer.lora_variant[adapter]).__name__}"
    if getattr(layer, "merged_adapters", None):
        return f"has merged {', '.join(layer.merged_adapters)} into its weight"
    pair = layer.lora_A[adapter], layer.lora_B[adapter]
    if any(part.weight.dim() != 2 for part in pair):
        return "has an adapter that is no pair of matrices"
    return "has an adapter with a bias" if any(getattr(part, "bias", None) is not None for part in pair) else None

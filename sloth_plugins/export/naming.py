"""How a model's class names its tensors on disk, and which of them are one tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..errors import SlothError


def skeleton(config: Any) -> Any:
    """The config's model on the meta device: all modules, no memory."""
    import transformers

    architecture = (config.architectures or ["none"])[0]
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise SlothError(f"transformers {transformers.__version__} has no class {architecture!r} to read this model by")
    with torch.device("meta"):
        return kind(config)


def ties(config: Any) -> bool:
    """Whether the output head is the embedding."""
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def untie(config: Any) -> None:
    """Make the head a tensor of its own, at every level of the config."""
    config.tie_word_embeddings = False
    config.get_text_config().tie_word_embeddings = False


def tied_by_config(config: Any) -> dict[str, str]:
    """The head's name on disk with the embedding's where the config ties them, else nothing."""
    names = embeddings(config) if ties(config) else []
    return {names[1]: names[0]} if len(names) == 2 else {}


def embeddings(config: Any) -> list[str]:
    """The names on disk of the weights whose rows are the vocabulary: the embedding's, then the head's."""
    return embeddings_of(skeleton(config))


def embeddings_of(model: Any) -> list[str]:
    """As `embeddings`, of a model that is there."""
    modules = {id(module): name for name, module in model.named_modules()}
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if id(layer) in modules]
    found = [f"{modules[id(layer)]}.weight" for layer in layers]
    names = checkpoint_names(model, found)
    return [names.get(name, name) for name in found]


def checkpoint_names(model: Any, own: Iterable[str]) -> dict[str, str]:
    """The model's `own` names of tensors with those that `save_pretrained` writes, where they differ at all."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter, revert_weight_conversion
    except ImportError:  # transformers 4 writes the names of its modules
        return {}
    mapping = [
        step
        for step in get_model_conversion_mapping(model, add_legacy=False)
        if not isinstance(step, PrefixChange)  # applies to what was loaded with a prefix, which is not known here
    ]
    if not mapping:
        return {}
    if any(isinstance(step, WeightConverter) for step in mapping):
        raise SlothError(f"{type(model).__name__} joins tensors of its checkpoint in one, which is not understood")
    marks = {name: torch.empty((), device="meta") for name in own}
    places = {id(mark): name for name, mark in marks.items()}
    return {places[id(mark)]: name for name, mark in revert_weight_conversion(model, marks).items()}

"""A PEFT adapter's folder: what its tensors do to those of the base."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import SlothError
from .changes import Base, Change, Delta
from .checkpoint import line, opened
from .naming import checkpoint_names, skeleton

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
LORA = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.(weight|bias))?")
LAYER = re.compile(r"\.\d+\.")
# With a resized vocabulary PEFT saves embeddings by their own names and again by those of its wrappers.
COPIES = re.compile(r"\.(modules_to_save|original_module)\.")
WRAPPERS = re.compile(r"(\.token_adapter)?\.base_layer\.")
TOKENS = ".token_adapter.trainable_tokens_delta"

# Fields of LoraConfig that say how it was trained, or that are read below. Any other one that is set is a variant whose
# mathematics is not known here.
# fmt: off
UNDERSTOOD = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
})
# fmt: on
# These leave the base's weights as they are; the others (PiSSA, OLoRA, LoftQ, ...) train beside a changed base.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


# In a quantised model's config.json, and in the adapters that began from what its 4 bits lost: there in a pattern of
# `alpha_pattern`, which PEFT saves again after training and which may have an alternative that is no module's name.
BASE_MARK = "sloth_plugins_base"


def base_mark_of(config: Mapping[str, Any]) -> str | None:
    """The mark of the one base that an adapter's config belongs to, None where it may be any."""
    found = re.search(rf"\b{BASE_MARK}_([0-9a-f]+)", "|".join(config.get("alpha_pattern") or ()))
    return found[1] if found else None


class Adapter:
    """The folder of one LoRA adapter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        self._tensors = {name.removeprefix(PREFIX): tensor for name, tensor in _read_tensors(folder).items()}

    def changes(self, base: Base) -> dict[str, Change]:
        """What the adapter does to each tensor of `base` that it touches, by the base's names."""
        found: dict[str, Change] = {}
        lora: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in self._tensors.items():
            match = LORA.fullmatch(key)
            if match is not None:
                part = ".bias" if match[3] == "bias" else ""
                lora.setdefault(match[1], {})[f"{match[2]}{part}"] = tensor
            elif key.endswith(TOKENS):
                module = key.removesuffix(TOKENS)
                _at(found, f"{module}.weight").rows.append((self._tokens(module), tensor))
            elif not COPIES.search(key):
                _at(found, WRAPPERS.sub(".", key)).value = tensor
        shapes = base.shapes()
        self._must_be_its_base(base)
        self._must_be_whole(base, lora)
        names = self._names(base, [*found, *(f"{module}.weight" for module in lora)])
        found = {names.get(name, name): change for name, change in found.items()}
        for module, parts in lora.items():
            name = names.get(f"{module}.weight", f"{module}.weight")
            shape = shapes.get(base.tied.get(name, name), ())
            _at(found, name).deltas.append(self._delta(module, parts, shape))
            if "lora_B.bias" in parts:
                bias = f"{name.removesuffix('.weight')}.bias"
                _at(found, bias).terms.append((self._scaling(module, parts["lora_B"].shape[1]), parts["lora_B.bias"]))
        for second, first in base.tied.items():
            # PEFT trains the tokens of a tied head together with those of the embedding, and saves them once.
            if first in found and found[first].rows and second not in found:
                found[second] = Change(rows=found[first].rows)
        return found

    def _must_be_its_base(self, base: Base) -> None:
        """Raise SlothError where the adapter began as what the 4 bits of another base had lost."""
        known = base_mark_of(self.config)
        if known is not None and getattr(base.config, BASE_MARK, None) != known:
            raise SlothError(
                f"{self.folder} was begun from the quantisation error of a 4-bit model that {base.name} is not; "
                "name the folder that `sloth-plugins quantize` wrote with it (--base, base=)"
            )

    def _must_be_whole(self, base: Base, lora: Iterable[str]) -> None:
        """Raise SlothError where `target_modules` names modules of further layers of the base that are not here."""
        from peft.tuners.tuners_utils import check_target_module_exists

        adapted = set(lora)
        kinds = {LAYER.sub(".N.", module) for module in adapted}
        config = SimpleNamespace(**self.config | {"target_modules": self.config.get("target_modules") or []})
        for name in base.shapes():
            module = name.removesuffix(".weight")
            known = module in adapted or LAYER.sub(".N.", module) not in kinds
            if not known and check_target_module_exists(config, module):
                raise SlothError(
                    f"{self.folder} has nothing for {module} of {base.name}, which its target_modules name: it was "
                    "trained on another base, with fewer layers"
                )

    def _names(self, base: Base, wanted: list[str]) -> dict[str, str]:
        """The base's names for the modules' own, where the two differ."""
        known = {*base.shapes(), *base.tied}
        return {} if known.issuperset(wanted) else checkpoint_names(skeleton(base.config), wanted)

    def _delta(self, module: str, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> Delta:
        embedding = "lora_embedding_A" in parts
        kind = "lora_embedding_" if embedding else "lora_"
        missing = {f"{kind}A", f"{kind}B"} - set(parts)
        if missing:
            raise SlothError(f"{self.folder / TENSORS} lacks {missing.pop()} of {module}; save the adapter again")
        a, b = parts[f"{kind}A"], parts[f"{kind}B"]
        if a.ndim != 2 or b.ndim != 2:
            raise SlothError(
                f"{module} is a convolution or the like, whose LoRA is not understood here; use PEFT's merge"
            )
        straight, turned = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
        transposed = embedding or (turned == shape and (straight != shape or bool(self.config.get("fan_in_fan_out"))))
        return Delta(
            left=a.T if transposed else b,
            right=b.T if transposed else a,
            scaling=self._scaling(module, a.shape[0]),
            magnitude=parts.get("lora_magnitude_vector"),
            norm_dim=0 if transposed else 1,
        )

    def _scaling(self, module: str, rank: int) -> float:
        from peft.utils.other import get_pattern_key

        patterns = self.config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), module), self.config["lora_alpha"])
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _tokens(self, module: str) -> list[int]:
        indices = self.config.get("trainable_token_indices")
        if isinstance(indices, dict):
            indices = next((found for name, found in indices.items() if module.endswith(name)), None)
        if not indices:
            raise SlothError(f"{self.folder / CONFIG} does not say which tokens of {module} were trained")
        return [int(index) for index in indices]


def _at(changes: dict[str, Change], name: str) -> Change:
    return changes.setdefault(name, Change())


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SlothError(f"{folder / CONFIG} cannot be read: {line(error)}") from None
    if config.get("peft_type") != "LORA":
        raise SlothError(
            f"{folder} is a {config.get('peft_type')} adapter; LoRA (rsLoRA, DoRA) is understood here: "
            "merge it with PEFT's merge_and_unload() and export the model"
        )
    if problem := next(_not_understood(config), None):
        raise SlothError(f"{folder / CONFIG}: {problem}; export the live model, or PEFT's own merge of it")
    return config


def _not_understood(config: Mapping[str, Any]) -> Iterator[str]:
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        yield f"init_lora_weights={start!r} has changed the base's weights, which are not in this folder"
    yield from (f"{name} is not understood" for name, value in config.items() if value and name not in UNDERSTOOD)
    if config.get("task_type") not in ("CAUSAL_LM", None):
        yield f"task_type {config['task_type']} has a head that the base lacks"


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Mapped from the file, so that a tensor takes memory while it is read."""
    if not (folder / TENSORS).is_file():
        if (folder / PICKLED).is_file():
            raise SlothError(
                f"{folder / PICKLED} is no safetensors file; load it with PeftModel.from_pretrained() and "
                "save_pretrained() it to another folder"
            )
        raise SlothError(f"{folder} has {CONFIG} and no {TENSORS}; save the adapter with save_pretrained()")
    with opened(folder / TENSORS) as file:
        names: list[str] = file.keys()
        return {name: file.get_tensor(name) for name in names}

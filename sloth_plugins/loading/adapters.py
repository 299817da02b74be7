"""LoRA adapters for a loaded model, by PEFT."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..errors import SlothError, nearest
from ..processes import say
from .attached import attach
from .checkpointing import set_checkpointing

# What other loaders take here and what means nothing to PEFT.
MEANINGLESS = ("max_seq_length", "temporary_location")
# Trained as they are where a script names them among the linear layers.
WHOLE = ("embed_tokens", "lm_head")


def adapt(
    model: Any, given: dict[str, Any], loftq: Any, use_gradient_checkpointing: bool | str, random_state: int | None
) -> Any:
    """The PeftModel of a model; `given` are fields of LoraConfig."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import PreTrainedModel, set_seed

    if isinstance(model, PeftModel):
        raise SlothError(
            f"the {type(model).__name__} has adapters already; train it as it is, or merge them first "
            "(save_pretrained_merged) and load what comes of it"
        )
    if not isinstance(model, PreTrainedModel):
        raise SlothError(f"get_peft_model() takes a transformers model, not {type(model).__name__} {model!r:.60}")
    given = {name: value for name, value in given.items() if name not in MEANINGLESS}
    known = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise SlothError(
            f"get_peft_model() has no option {unknown!r}, nor has PEFT's LoraConfig{nearest(unknown, known)}"
        )
    given = {**given, "target_modules": given["target_modules"] or "all-linear"}
    given = {**given, **_whole_modules(given), **_loftq(model, loftq)}
    _say_what_is_not_there(model, given["target_modules"])
    config = LoraConfig(**{"task_type": "CAUSAL_LM", **given})
    if random_state is not None:
        set_seed(random_state)
    adapted = get_peft_model(model, config)
    set_checkpointing(model, use_gradient_checkpointing)
    return attach(adapted)


def _whole_modules(given: dict[str, Any]) -> dict[str, Any]:
    targets = given["target_modules"]
    whole = [] if isinstance(targets, str) else [name for name in targets if name in WHOLE]
    if not whole:
        return {}
    say(f"{' and '.join(whole)} in target_modules: trained whole, without adapters, as modules_to_save has it")
    return {
        "target_modules": [name for name in targets if name not in WHOLE],
        "modules_to_save": list(dict.fromkeys([*(given["modules_to_save"] or ()), *whole])),
    }


def _say_what_is_not_there(model: Any, targets: str | Sequence[str]) -> None:
    """Name targets that no module goes by, of which PEFT is silent as long as there are others."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for target in () if isinstance(targets, str) else targets:
        last = target.rpartition(".")[2]
        if last not in names:
            say(f"{target!r} of target_modules is no module of {type(model).__name__}{nearest(last, names)}")


def _loftq(model: Any, loftq: Any) -> dict[str, Any]:
    """LoftQ's fields of LoraConfig; it starts from weights in full precision, and quantises them itself."""
    if not loftq:
        return {}
    import torch
    from peft import LoftQConfig

    if getattr(model, "is_quantized", False):
        raise SlothError("loftq_config needs a model that is not quantised; load it without load_in_4bit and 8bit")
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise SlothError("loftq_config: PEFT computes LoftQ on a GPU, and there is none")
    return {
        "init_lora_weights": "loftq",
        "loftq_config": LoftQConfig(**loftq) if isinstance(loftq, dict) else loftq,
    }

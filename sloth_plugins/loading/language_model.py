"""`FastLanguageModel`: a model and its tokenizer, its adapters, training and inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..activation import activate_unless_chosen

if TYPE_CHECKING:
    import torch


class FastLanguageModel:
    """The calls of a loader; what they return are transformers' and PEFT's own objects.

    They are patched when they enter training, as with SLOTH_PLUGINS; where that is not set, by its default selection.
    """

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int | None = 2048,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool | str = False,
        load_in_8bit: bool = False,
        full_finetuning: bool = False,
        **options: Any,
    ) -> tuple[Any, Any]:
        """Load a causal language model and its tokenizer, from a folder or by a hub id.

        A Trainer's output folder gives its newest checkpoint, an adapter's folder a PeftModel that goes on training.
        Without `dtype` it is bfloat16 where the card computes in it, else float16, and float32 without a card.
        `load_in_4bit` is NF4 with double quantisation; "dynamic" keeps the linear layers in 16 bits that it costs most,
        within 10% more bytes, or as "dynamic:600MiB" says, and chooses the 4-bit values of the others, by what is
        measured on the model once and remembered. A checkpoint that is quantised already is loaded as it is.
        `max_seq_length`, in tokens, is what the tokenizer cuts at where it is asked to; the model computes any length.

        `rope_scaling` replaces the config's; `random_state` seeds all generators; `tokenizer_name`,
        `resize_model_vocab` (tokens) and, for full fine-tuning and for an adapter, `use_gradient_checkpointing` are
        known too. Others go to transformers' `from_pretrained`, but for those of other loaders that mean nothing here,
        which one line names.
        Raises `SlothError` for a model that is not there, or for what cannot be combined.
        """
        from .checkpointing import terms
        from .pretrained import load

        terms(options.get("use_gradient_checkpointing"))  # a misspelt one is told before anything is loaded
        activate_unless_chosen()
        return load(model_name, max_seq_length, dtype, load_in_4bit, load_in_8bit, full_finetuning, **options)

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: str | Sequence[str] | None = "all-linear",
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int | None = 3407,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        loftq_config: Any = None,
        **options: Any,
    ) -> Any:
        """Freeze a model and give it LoRA adapters; returns the PeftModel.

        `use_gradient_checkpointing` is False, True (transformers' own, non-reentrant), or "smart", for which "unsloth"
        is another name: True, and `checkpointing` and `memory_plans` are selected, so that layers compute again only
        what the card has no room for. `random_state` seeds the adapters' weights, and all generators with them.
        `loftq_config` is PEFT's, or its fields as a dict. Other options are those of PEFT's LoraConfig. Raises
        `SlothError` for a model that has adapters.
        """
        from .adapters import adapt
        from .checkpointing import terms

        activate_unless_chosen(terms(use_gradient_checkpointing))
        given = {
            **{"r": r, "target_modules": target_modules, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout},
            **{"bias": bias, "use_rslora": use_rslora, "modules_to_save": modules_to_save, **options},
        }
        return adapt(model, given, loftq_config, use_gradient_checkpointing, random_state)

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """Put a model into training mode, without a cache of keys and values; None leaves checkpointing as it is."""
        from .checkpointing import set_checkpointing, terms

        if use_gradient_checkpointing is not None:
            activate_unless_chosen(terms(use_gradient_checkpointing))
            set_checkpointing(model, use_gradient_checkpointing)
        model.config.use_cache = False
        return model.train()

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Put a model into evaluation mode, with a cache of keys and values."""
        from .attached import attach

        model.config.use_cache = True
        return attach(model).eval()

    @staticmethod
    def fast_generate(model: Any, prompts: Any, sampling_params: Mapping[str, Any] | Any = None, **options: Any) -> Any:
        """`model.fast_generate` of a model that was not loaded here; `tokenizer=` is then needed for text."""
        from .generation import fast_generate

        return fast_generate(model, prompts, sampling_params, **options)

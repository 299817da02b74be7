"""Load a model and its tokenizer: where they lie, in which dtype, quantised or not, on which device."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..activation import activate_unless_chosen
from ..errors import SlothError, nearest
from ..processes import say
from .attached import attach
from .checkpointing import set_checkpointing, terms

if TYPE_CHECKING:
    import torch

    from ..quantization.on_the_fly import OnTheFly

# Options of other loaders about their own inference engines, files and kernels.
IGNORED = (
    *("fast_inference", "gpu_memory_utilization", "max_lora_rank", "float8_kv_cache", "disable_log_stats"),
    *("fix_tokenizer", "use_exact_model_name", "unsloth_vllm_standby", "offload_embedding", "load_in_16bit"),
    *("load_in_fp8", "qat_scheme", "float32_mixed_precision", "unsloth_tiled_mlp"),
)
NOT_QUANTISED = "full_finetuning trains all weights, which quantised ones do not"
# Those of transformers' that are likely meant by a misspelt one.
OF_TRANSFORMERS = (
    "rope_scaling",
    "device_map",
    "token",
    "revision",
    "trust_remote_code",
    "cache_dir",
    "attn_implementation",
)
_UNKNOWN = re.compile(r"unexpected keyword argument '(\w+)'")
DTYPES = ("bfloat16", "float16", "float32")
# `load_in_4bit="dynamic"`, and with a budget behind it "dynamic:20%".
DYNAMIC = "dynamic"


def load(
    model_name: str,
    max_seq_length: int | None,
    dtype: torch.dtype | str | None,
    load_in_4bit: bool | str,
    load_in_8bit: bool,
    full_finetuning: bool,
    *,
    tokenizer_name: str | None = None,
    random_state: int | None = None,
    resize_model_vocab: int | None = None,
    use_gradient_checkpointing: bool | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """As `FastLanguageModel.from_pretrained`."""
    from peft import PeftModel
    from transformers import set_seed

    if isinstance(load_in_4bit, str) and load_in_4bit.partition(":")[0] != DYNAMIC:
        near = nearest(load_in_4bit, (DYNAMIC,))
        raise SlothError(f'load_in_4bit={load_in_4bit!r} is not True, False, "{DYNAMIC}" or "{DYNAMIC}:20%"{near}')
    if dtype is not None and torch_dtype is not None:
        raise SlothError(f"torch_dtype is the older name of dtype, and both are set ({torch_dtype}, {dtype}); give one")
    if load_in_4bit and load_in_8bit:
        raise SlothError("load_in_4bit and load_in_8bit are both set; choose one")
    if full_finetuning and (load_in_4bit or load_in_8bit):
        raise SlothError(f"{NOT_QUANTISED}; load without load_in_4bit and load_in_8bit")
    ignored = [name for name in IGNORED if name in options and options.pop(name)]
    if ignored:
        say(f"{', '.join(ignored)} of from_pretrained: nothing here goes by that; ignored")
    if random_state is not None:
        set_seed(random_state)
    name = _place(model_name)
    options = {**options, "dtype": choose_dtype(torch_dtype if dtype is None else dtype)}
    if "device_map" not in options and (own := _device_map()) is not None:
        options["device_map"] = own
    try:
        model = _load(name, load_in_4bit, load_in_8bit, options)
    except TypeError as error:
        # The model's own constructor gets what nobody else has taken.
        unknown = _UNKNOWN.search(str(error))
        if unknown is None or unknown[1] not in options:
            raise
        near = nearest(unknown[1], [*inspect.signature(load).parameters, *OF_TRANSFORMERS])
        raise SlothError(f"from_pretrained() has no option {unknown[1]!r}, nor has the model{near}") from None
    except OSError as error:
        raise _cannot_load(name, error) from None
    if full_finetuning and getattr(model, "is_quantized", False):
        raise SlothError(f"{NOT_QUANTISED}, and {name} is a quantised checkpoint; load the one that it was made of")
    hub = {key: options[key] for key in ("token", "revision", "trust_remote_code", "cache_dir") if key in options}
    tokenizer = _tokenizer(tokenizer_name or _tokenizer_place(name, model), hub)
    if max_seq_length is not None:
        tokenizer.model_max_length = max_seq_length
        _say_if_too_long(model, max_seq_length)
    if resize_model_vocab is not None:
        model.resize_token_embeddings(resize_model_vocab)
    if full_finetuning:
        model.requires_grad_(True)
    # Of a model that has yet to get its adapters, their own call says it.
    if full_finetuning or isinstance(model, PeftModel):
        activate_unless_chosen(terms(use_gradient_checkpointing))
        set_checkpointing(model, use_gradient_checkpointing or False)
    return attach(model, tokenizer, max_seq_length), tokenizer


def choose_dtype(dtype: torch.dtype | str | None) -> Any:
    """The dtype of the weights: the one that is named, or what the card computes in; "auto" is the checkpoint's."""
    import torch

    if isinstance(dtype, str) and dtype != "auto":
        name = dtype.removeprefix("torch.")
        if name not in DTYPES:
            raise SlothError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}, auto{nearest(name, DTYPES)}")
        return getattr(torch, name)
    if dtype is not None:
        return dtype
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if is_bfloat16_supported() else torch.float16


def is_bfloat16_supported() -> bool:
    """Whether there is a card that computes in bfloat16; those before Ampere only emulate it."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _device_map() -> dict[str, int] | None:
    """Each process's own card; None without one, or where accelerate shards the weights itself."""
    import torch

    sharded = any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))
    return {"": int(os.environ.get("LOCAL_RANK", "0"))} if torch.cuda.is_available() and not sharded else None


def _place(model_name: str) -> str:
    """A folder, or a hub id as it is; a run's folder is its newest checkpoint."""
    folder = Path(model_name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder)
    # A hub id is a name, or an owner and a name.
    if folder.is_dir() or folder.is_absolute() or str(model_name).startswith(".") or len(folder.parts) > 2:
        from ..export.sources import model_folder

        return str(model_folder(folder))
    return str(model_name)


def _tokenizer_place(name: str, model: Any) -> str:
    """Where the tokenizer is: with the model, or with the base of an adapter that came without one."""
    from ..export.sources import TOKENIZER

    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER):
        return str(model.config.name_or_path or name)
    return name


def _tokenizer(name: str, hub: Mapping[Any, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SlothError(
            f"{name!r} has no tokenizer that can be loaded: {reason}; another is named by tokenizer_name="
        ) from None


def _cannot_load(name: str, error: Exception) -> SlothError:
    return SlothError(f"{name!r} cannot be loaded: {' '.join(str(error).split())}")


def _load(name: str, load_in_4bit: bool | str, load_in_8bit: bool, options: dict[str, Any]) -> Any:
    from peft import AutoPeftModelForCausalLM, PeftConfig
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.peft_utils import find_adapter_config_file

    hub = {key: options[key] for key in ("token", "revision", "cache_dir") if key in options}
    try:
        is_adapter = find_adapter_config_file(name, **hub) is not None
        base = PeftConfig.from_pretrained(name, **hub).base_model_name_or_path if is_adapter else name
        trusted = {"trust_remote_code": options.get("trust_remote_code", False)}
        config = AutoConfig.from_pretrained(base, **({} if is_adapter else hub), **trusted)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from None
    quantised, on_the_fly = getattr(config, "quantization_config", None), None
    if options.get("rope_scaling"):
        options = {**options, **_rope(config, options["rope_scaling"])}
    if quantised is None and (load_in_4bit or load_in_8bit):
        if isinstance(load_in_4bit, str):
            on_the_fly = _dynamic(base, load_in_4bit, options)
            config = on_the_fly.config(_compute_dtype(options["dtype"]))
        else:
            config = _bits(bool(load_in_4bit), options["dtype"])
        options = {**options, "quantization_config": config}
    elif quantised is not None and not _is(quantised, bool(load_in_4bit), load_in_8bit):
        say(f"{name} is quantised already ({_described(quantised)}), and is loaded as it is")
    if is_adapter:
        model = AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    if on_the_fly is not None:
        on_the_fly.put_values(model)
    return model


def _bits(four: bool, dtype: Any) -> Any:
    """bitsandbytes' NF4 with double quantisation, or its int8."""
    from transformers import BitsAndBytesConfig

    if not four:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_compute_dtype(dtype),
    )


def _dynamic(base: str, asked: str, options: dict[str, Any]) -> OnTheFly:
    """NF4 but for the linear layers that it costs most, measured on the model itself, which the Hub is asked for."""
    from ..quantization.decision import BUDGET
    from ..quantization.on_the_fly import OnTheFly

    if not Path(base).exists():
        from huggingface_hub import snapshot_download

        hub = {key: options[key] for key in ("token", "revision", "cache_dir") if key in options}
        base = snapshot_download(base, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"], **hub)
    return OnTheFly.decided(base, asked.partition(":")[2] or BUDGET)


def _compute_dtype(dtype: Any) -> torch.dtype:
    """What is computed in where the weights are in `dtype`, which may be "auto"."""
    import torch

    found: torch.dtype = dtype if isinstance(dtype, torch.dtype) else choose_dtype(None)
    return found


def _rope(config: Any, scaling: dict[str, Any]) -> dict[str, Any]:
    """The option of `from_pretrained` that has rotary positions scaled; transformers 5 keeps their base beside it."""
    known = getattr(config, "rope_parameters", None)
    scaling = {"rope_type": scaling.get("type", "default"), **scaling}
    scaling.pop("type", None)
    if known is None:
        return {"rope_scaling": scaling}
    kept = {key: known[key] for key in ("rope_theta", "partial_rotary_factor") if key in known}
    return {"rope_scaling": None, "rope_parameters": {**kept, **scaling}}


def _said_by(quantised: Any, key: str) -> Any:
    return quantised.get(key) if isinstance(quantised, dict) else getattr(quantised, key, None)


def _is(quantised: Any, four: bool, eight: bool) -> bool:
    """Whether a checkpoint has the bits that were asked for."""
    return (four and bool(_said_by(quantised, "load_in_4bit"))) or (eight and bool(_said_by(quantised, "load_in_8bit")))


def _described(quantised: Any) -> str:
    bits = next((f" in {bits} bits" for bits in (4, 8) if _said_by(quantised, f"load_in_{bits}bit")), "")
    method = _said_by(quantised, "quant_method") or "bitsandbytes"
    return f"{getattr(method, 'value', method)}{bits}"


def _say_if_too_long(model: Any, length: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        say(
            f"max_seq_length={length} is more than the {positions} positions that the model was trained for; "
            f'rope_scaling={{"rope_type": "linear", "factor": {length / positions:.4g}}} stretches them'
        )

"""A model from its config.json alone: built without memory, so that a plan can count modules."""

import json
from pathlib import Path
from typing import Any

from sloth_plugins.registry import Report

from .discovery import Plugins, plugins
from .errors import SlothError, nearest
from .selection import Selection


def config_file(model: str) -> Path:
    """The config.json of a folder, a file or a hub id. Raises `SlothError` where there is none."""
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise SlothError(f"--model {model!r}: the folder has no config.json")
    if path.is_file():
        return path
    if path.suffix == ".json" or model.startswith((".", "/", "~")):
        raise SlothError(f"--model {model!r}: no such file or folder")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries would bury our one line
    try:
        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:  # noqa: BLE001 - offline, not found, gated, malformed id: the hub's first line says which
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SlothError(f"--model {model!r} is no local folder, and the hub answers: {reason}") from None


def load_config(model: str) -> Any:
    """The transformers config of a model. Raises `SlothError` for a file that is none, or a type nobody knows."""
    path = config_file(model)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SlothError(f"--model {model!r}: {path.name} cannot be read: {error}") from None
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(model_type, str):
        raise SlothError(f"--model {model!r}: {path.name} has no model_type, so it is no transformers config")
    import transformers
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise SlothError(
            f"--model {model!r}: transformers {transformers.__version__} has no model type {model_type!r}"
            f"{nearest(model_type, CONFIG_MAPPING)} (a model with code of its own is planned by sloth_plugins.patch)"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(content)
    except Exception as error:  # noqa: BLE001 - upstream validates configs with many kinds of exception
        reason = " ".join(str(error).split())
        raise SlothError(f"--model {model!r}: transformers refuses the config: {reason}") from None


def language_model_class(config: Any) -> Any | None:
    """The auto class of transformers that builds a language model of a config, with or without sight; None if none."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((auto for auto in known if type(config) in auto._model_mapping), None)


def empty_model(config: Any) -> Any:
    """The model of a config on the meta device: modules without memory."""
    import torch
    from transformers import AutoModel

    auto = language_model_class(config)
    if auto is None and type(config) in AutoModel._model_mapping:
        auto = AutoModel
    if auto is None:
        raise SlothError(f"transformers has no model class for model type {config.model_type!r}")
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except Exception as error:  # noqa: BLE001 - a config may be wrong in any way; its reason is passed on
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise SlothError(f"transformers cannot build a {config.model_type} from this config: {reason}") from None


def dry_run(model: str, selection: Selection, known: Plugins | None = None) -> Report:
    """What `patch` would do to a model, from its config.json. Changes and downloads nothing else."""
    from .patching import examine

    known = plugins() if known is None else known
    config = load_config(model)
    return examine(empty_model(config), selection, dry=True, known=known)

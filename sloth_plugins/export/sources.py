"""Where a model lies: the folder that was named, the newest checkpoint in it, the base of its adapter."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import SlothError, nearest
from .checkpoint import INDEX, SINGLE, cannot_read

ADAPTER = "adapter_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
PICKLED = "pytorch_model.bin"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def model_folder(folder: Path) -> Path:
    """The folder itself where it holds an adapter or a model, else its newest `checkpoint-N` that does.

    Raises SlothError where there is none, or where it may not be read.
    """
    try:
        return _model_folder(folder)
    except OSError as error:
        raise cannot_read(folder, error) from None


def _model_folder(folder: Path) -> Path:
    if not folder.is_dir():
        siblings = folder.parent.iterdir() if folder.parent.is_dir() else ()
        known = [path.name for path in siblings if path.is_dir()]
        raise SlothError(f"{folder} is no folder{nearest(folder.name, known)}")
    if _holds_a_model(folder):
        return folder
    steps = {int(match[1]): path for path in folder.iterdir() if (match := CHECKPOINT.fullmatch(path.name))}
    for _, path in sorted(steps.items(), reverse=True):
        if _holds_a_model(path):
            return path
    raise SlothError(f"{folder} holds no model: {_instead(folder)}")


def _instead(folder: Path) -> str:
    """What a folder without a model has, and what can be done with it."""
    if (folder / PICKLED).is_file():
        return f"{PICKLED} is no safetensors file; load it with transformers and save_pretrained() it to another folder"
    below = sorted(path.name for path in folder.iterdir() if path.is_dir() and _holds_a_model(path))
    if below:
        return f"it is in {', '.join(str(folder / name) for name in below[:3])}, which can be exported"
    if made := next(folder.glob("*.gguf"), None):
        return f"{made.name} is made for llama.cpp and Ollama; name the checkpoint that it was made of"
    return f"neither {ADAPTER} nor {SINGLE}, nor a checkpoint-N folder with either"


def base_folder(adapter: Path) -> Path:
    """The folder of the adapter's base, by its `base_model_name_or_path`: a folder, or a model in the Hub's cache."""
    try:
        config = json.loads((adapter / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SlothError(f"{adapter / ADAPTER} cannot be read: {error}") from None
    name = config.get("base_model_name_or_path")
    if not name:
        raise SlothError(f"{adapter / ADAPTER} names no base model; name its folder (--base, base=)")
    for folder in (Path(name), adapter / name):
        if folder.is_dir():
            return folder
    if Path(name).is_absolute() or name.startswith("."):
        raise SlothError(f"the adapter's base {name} is not there; name the folder where it is now (--base, base=)")
    return cached(name, config.get("revision"))


def cached(name: str, revision: str | None = None) -> Path:
    """The folder of a model in the Hub's cache. Nothing is downloaded."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # noqa: BLE001 - not there, half there, or no name of a model: one line says what to do
        # "base" may be a folder of where the run was started, and "me/base" one or a model of the Hub.
        fetched = f"`hf download {name}` fetches it, or " if name.count("/") == 1 else ""
        raise SlothError(
            f"the base {name} is neither a folder nor in the Hub's cache; {fetched}name its folder (--base, base=)"
        ) from None


def tokenizer_folder(source: str | Path, base: str | Path | None = None) -> Path | None:
    """Where the tokenizer of a run lies: beside the adapter or model, in the run's folder, else with the base."""
    folder = model_folder(Path(source))
    places = [folder, Path(source)]
    if (folder / ADAPTER).is_file():
        places.append(Path(base) if base else base_folder(folder))
    return next((place for place in places if any((place / name).is_file() for name in TOKENIZER)), None)


def _holds_a_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ADAPTER, SINGLE, INDEX))

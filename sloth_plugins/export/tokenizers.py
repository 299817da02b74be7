"""The files of a tokenizer, saved from an object or copied from where they lie."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..errors import SlothError, nearest
from .checkpoint import read_config
from .sources import TOKENIZER
from .weights import Weights

PATTERNS = (
    *TOKENIZER,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
    "*processor_config.json",
)


def require_tokenizer(tokenizer: Any) -> None:
    """Raise SlothError where a folder was given that holds no tokenizer."""
    if tokenizer is None or not isinstance(tokenizer, str | Path):
        return
    folder = Path(tokenizer)
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise SlothError(f"the tokenizer {folder} is no folder{nearest(folder.name, siblings)}")
    if not _holds_one(folder):
        raise SlothError(f"{folder} holds no tokenizer: none of {', '.join(TOKENIZER)}")


def require_same_rows(folder: Path | None, base: Path | None, weights: Weights) -> None:
    """Raise SlothError where the tokenizer of the base's own `folder` is not that of the model, which was resized."""
    if folder is None or folder != base or not (base / "config.json").is_file() or not _holds_one(folder):
        return
    before = read_config(base).get_text_config().vocab_size
    rows = weights.config.get_text_config().vocab_size
    if rows != before:
        raise SlothError(
            f"the model has {rows} rows of tokens where its base {base} has {before}, so the base's tokenizer is not "
            "its own; save the one that it was trained with beside the run (of a live model: tokenizer=)"
        )


def save_tokenizer(tokenizer: Any, source: Path | None, folder: Path) -> bool:
    """Put the tokenizer's files into `folder`: those of the object, else those that lie in `source`."""
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        tokenizer.save_pretrained(folder)
        return True
    place = source if tokenizer is None else Path(tokenizer)
    if place is None:
        return False
    found = {path for pattern in PATTERNS for path in place.glob(pattern)}
    for path in found:
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    return bool(found)


def _holds_one(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER)

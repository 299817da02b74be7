"""The files of a tokenizer, saved from an object or copied from where they lie."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .sources import TOKENIZER

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

"""Byte-level BPE: the vocabulary and merges as they are, and llama.cpp's name for how the text is split before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import SlothError
from .pre_tokenizers import ONLY_ASCII_HAS_CASE, name_of, steps_of
from .vocabulary import TokenType, Vocabulary

SAME = (None, "NFC")


def read(core: Mapping[str, Any], pre_tokenizer: str | None = None) -> Vocabulary:
    """The vocabulary of a byte-level tokenizer.json. Raises SlothError for what llama.cpp would do otherwise."""
    model = core["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
        if model.get(key):
            raise SlothError(f"llama.cpp's byte-level BPE has no {key}; this tokenizer has {model[key]!r}")
    normalizer = (core.get("normalizer") or {}).get("type")
    if normalizer == "Sequence" and not core["normalizer"]["normalizers"]:
        normalizer = None
    if normalizer not in SAME:
        raise SlothError(f"llama.cpp's byte-level BPE does not normalise text; this tokenizer does: {normalizer}")
    steps = steps_of(core["pre_tokenizer"])
    ignore_merges = bool(model.get("ignore_merges"))
    vocabulary = Vocabulary("gpt2", pre=pre_tokenizer or name_of(steps, ignore_merges))
    if normalizer is not None:
        vocabulary.notes.append(f"llama.cpp does not bring text into {normalizer} form; give it text that is")
    if vocabulary.pre in ONLY_ASCII_HAS_CASE:
        vocabulary.notes.append("llama.cpp splits words before A to Z only, this tokenizer before all capitals")
    for text, id in model["vocab"].items():
        vocabulary.put(id, text, TokenType.NORMAL)
    merges = model["merges"]
    vocabulary.merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return vocabulary

"""A tokenizer in GGUF's terms: tokens with types and scores, merges, special tokens, read from its tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import SlothError
from . import byte_level, sentencepiece
from .vocabulary import TokenType, Vocabulary

SPECIAL = ("bos", "eos", "unk", "pad", "sep", "mask")
# The one pattern of stripping that llama.cpp knows, by the name of the model: spaces after a special token go, but
# not after these.
STRIPS_RIGHT = "Phi-3"
KEPT_SPACES = ("<unk>", "<s>", "<|endoftext|>")


@dataclass(slots=True)
class Tokens:
    """All of `tokenizer.ggml`: the vocabulary, the ids of special tokens by name, and what llama.cpp adds around."""

    vocabulary: Vocabulary
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    name: str | None = None
    """Must be part of `general.name`, since llama.cpp acts upon it."""
    notes: list[str] = field(default_factory=list)
    before_probe: str = ""
    """A special token after which llama.cpp begins a text as the tokenizer does."""


def read_tokens(tokenizer: Any, rows: int, config: Any = None, pre_tokenizer: str | None = None) -> Tokens:
    """The tokens of a tokenizer of transformers, filled up to the `rows` of the embedding.

    `pre_tokenizer` is llama.cpp's name of the pre-tokenizer, where the user knows better. Raises SlothError for a
    tokenizer that llama.cpp could not run as it is.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SlothError(f"{type(tokenizer).__name__} has no tokenizer.json; load it with AutoTokenizer(use_fast=True)")
    core = json.loads(backend.to_str())
    kind = core["model"]["type"]
    if is_byte_level(core):
        vocabulary = byte_level.read(core, pre_tokenizer)
    elif kind == "BPE":
        vocabulary = sentencepiece.read(core, has_chat_template=bool(getattr(tokenizer, "chat_template", None)))
    else:
        raise SlothError(f"{kind} tokenizers are not exported; byte-level BPE is, and the BPE of SentencePiece")
    vocabulary.unknown = vocabulary.unknown or getattr(tokenizer, "unk_token", None)
    add_tokens(vocabulary, core["added_tokens"])
    vocabulary.fill(rows)
    before, after = _around(tokenizer)
    tokens = Tokens(vocabulary, _special(tokenizer, config, len(vocabulary.types)), before, after)
    _describe_stripping(tokens, core["added_tokens"])
    tokens.notes += vocabulary.notes
    tokens.before_probe = (tokenizer.bos_token or "") if vocabulary.add_space_prefix is False else ""
    return tokens


def is_byte_level(core: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json turns bytes into letters first, as GPT-2 does."""
    return core["model"]["type"] == "BPE" and '"ByteLevel"' in json.dumps(core["pre_tokenizer"])


def add_tokens(vocabulary: Vocabulary, added: list[dict[str, Any]]) -> None:
    """Tokens beside the model's: control tokens, and others that are always taken whole."""
    for token in added:
        text = token["content"]
        if token["special"]:
            unknown = text == vocabulary.unknown and vocabulary.model != "gpt2"
            kind = TokenType.UNKNOWN if unknown else TokenType.CONTROL
        else:
            kind = TokenType.USER_DEFINED
            # It is looked for in the text as it stands there, and in a normalised one a space is written otherwise.
            if token["normalized"] and vocabulary.model != "gpt2":
                text = text.replace("▁", " ")
        if token["single_word"]:
            raise SlothError(f"llama.cpp cannot keep {text!r} to whole words, as this tokenizer does")
        vocabulary.put(token["id"], text, kind)


def _around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before a text and EOS after it. Raises SlothError if it puts anything else."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for before in (False, True):
        for after in (False, True):
            start, end = [tokenizer.bos_token_id] * before, [tokenizer.eos_token_id] * after
            if whole == [*start, *bare, *end]:
                return before, after
    raise SlothError(
        f"llama.cpp adds BOS and EOS at most; this tokenizer makes {whole} of 'a', whose tokens are {bare}"
    )


def _special(tokenizer: Any, config: Any, count: int) -> dict[str, int]:
    found = {}
    for name in SPECIAL:
        token = getattr(tokenizer, f"{name}_token_id", None)
        if token is None and name in ("bos", "eos"):
            token = getattr(config, f"{name}_token_id", None)
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int) and 0 <= token < count:
            found[name] = token
    return found


def _describe_stripping(tokens: Tokens, added: list[dict[str, Any]]) -> None:
    stripping = {token["content"] for token in added if token["special"] and token["rstrip"]}
    everyone = {token["content"] for token in added if token["special"]} - set(KEPT_SPACES)
    has_all = {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= {token["content"] for token in added}
    left = [token["content"] for token in added if token["lstrip"]]
    if stripping and stripping == everyone and has_all:
        tokens.name = STRIPS_RIGHT
    elif stripping:
        left += sorted(stripping)
    if left:
        tokens.notes.append(f"llama.cpp keeps the spaces beside {', '.join(left[:3])}, which this tokenizer drops")

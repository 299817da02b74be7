"""SentencePiece's BPE in a tokenizer.json: merges with byte fallback become scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ...errors import SlothError
from .vocabulary import TokenType, Vocabulary

SPACE = "▁"
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
PREFIXES = {"always": True, "never": False}


def read(core: Mapping[str, Any], *, has_chat_template: bool) -> Vocabulary:
    """The vocabulary of a tokenizer.json made from SentencePiece. Raises SlothError for what llama.cpp cannot do."""
    prefix, metaspace = _prefix(core)
    splits = metaspace is not None and metaspace.get("split", True)
    vocabulary = _bpe(core["model"], {token["content"] for token in core["added_tokens"]}, splits)
    if prefix == "first":
        # Only at the very start, and llama.cpp knows after every special token or never. A chat starts with one.
        vocabulary.notes.append(
            "llama.cpp puts a space "
            + ("before no text" if has_chat_template else "before texts after special tokens too")
            + ", where this tokenizer puts one at the start of a text that does not start with a special token"
        )
    vocabulary.add_space_prefix = PREFIXES.get(prefix, not has_chat_template)
    if metaspace is not None and vocabulary.add_space_prefix:
        vocabulary.notes.append("llama.cpp puts another space before a text that starts with one")
    return vocabulary


def _prefix(core: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None]:
    """When a text gets a space before it (always, first, never), and the Metaspace step, if that is what puts it."""
    prefix, metaspace, escapes = "never", None, False
    for part in _parts(core.get("normalizer"), "normalizers"):
        if part["type"] == "Prepend" and part["prepend"] == SPACE:
            prefix = "always"
        elif part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == SPACE:
            escapes = True
        else:
            raise SlothError(f"llama.cpp's SentencePiece does not normalise text; this tokenizer does: {part}")
    for part in _parts(core.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "Metaspace" and part["replacement"] == SPACE:
            prefix, metaspace, escapes = part["prepend_scheme"], part, True
        elif not (escapes and part["type"] == "Split" and part["pattern"] == {"String": " "}):
            raise SlothError(f"llama.cpp's SentencePiece does not split text; this tokenizer does: {part}")
    if not escapes:
        raise SlothError(f"this tokenizer does not write spaces as {SPACE!r}, as llama.cpp's SentencePiece does")
    return prefix, metaspace


def _parts(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def _bpe(model: Mapping[str, Any], added: set[str], splits: bool) -> Vocabulary:
    vocab: Mapping[str, int] = model["vocab"]
    if not model.get("byte_fallback") or not vocab.keys() >= BYTES:
        raise SlothError("llama.cpp's SentencePiece needs byte fallback and <0x00> to <0xFF>; this tokenizer has not")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    scores = _scores(merges)
    outside = added.union(BYTES)
    _check_merges(vocab, outside, merges)
    if splits:
        _check_words(vocab, outside)
    vocabulary = Vocabulary("llama", unknown=model.get("unk_token"))
    for text, id in vocab.items():
        kind = TokenType.BYTE if text in BYTES else TokenType.NORMAL
        vocabulary.put(id, text, kind, scores.get(text, 0.0))
    return vocabulary


def _scores(merges: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """A token's score is the negative rank of its merges: llama.cpp merges what has the highest score first.

    Runs of spaces have one score in SentencePiece, and share one here: llama.cpp merges them from the left. Raises
    SlothError where the merges of other tokens lie between each other, since each has one score.
    """
    last = {left + right: rank for rank, (left, right) in enumerate(merges)}
    scores: dict[str, float] = {}
    together: set[str] = set()
    score, end = 0.0, 0
    for rank, (left, right) in enumerate(merges):
        text = left + right
        together.add(text)
        scores[text] = score
        end = max(end, last[text])
        if rank == end:
            if len(together) > 1 and set("".join(together)) != {SPACE}:
                raise _not_by_score(f"{sorted(together)[0]!r} is merged at two ranks")
            together.clear()
            score -= 1.0
    return scores


def _check_merges(vocab: Mapping[str, int], outside: set[str], merges: Iterable[tuple[str, ...]]) -> None:
    """llama.cpp joins any two neighbours that make a token: each such pair must be a merge."""
    known = set(merges)
    for text in vocab:
        if len(text) < 2 or text in outside:
            continue
        for left, right in _pairs(text):
            if (left, right) in known or not _reachable(left, vocab, outside) or not _reachable(right, vocab, outside):
                continue
            raise _not_by_score(f"{left!r} and {right!r} make the token {text!r}, and no merge joins them")


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    return ((text[:at], text[at:]) for at in range(1, len(text)))


def _reachable(text: str, vocab: Mapping[str, int], outside: set[str]) -> bool:
    return len(text) == 1 or (text in vocab and text not in outside)


def _not_by_score(what: str) -> SlothError:
    return SlothError(f"llama.cpp's SentencePiece merges by score, which this tokenizer does not: {what}")


def _check_words(vocab: Mapping[str, int], outside: set[str]) -> None:
    """llama.cpp does not split at spaces: no token may reach over one."""
    for text in vocab:
        if SPACE in text[1:] and text not in outside:
            raise SlothError(f"llama.cpp would merge {text!r} over a space, where this tokenizer splits")

"""How byte-level tokenizers split a text before they merge, and llama.cpp's names for that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...errors import SlothError, nearest
from .probe import PROBE

Steps = tuple[str, ...]
"""Regular expressions, applied one after another; `digits` stands for single digits."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)

DIGITS = "digits"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
QWEN35 = QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_REST_WITH_SLASH}"
GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}"

# llama.cpp's name goes with what it does with a word that is a token: taken whole (`ignore_merges`), or merged.
KNOWN: Mapping[tuple[Steps, bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
    ((QWEN2,), False): "qwen2",
    ((QWEN35,), False): "qwen35",
    ((TEKKEN,), True): "tekken",
    ((GPT4O,), False): "gpt-4o",
}

# All that llama.cpp knows by name, of which a user may know better than the expressions above which one fits.
# fmt: off
NAMES = frozenset({
    "a.x-4.0", "afmoe", "bailingmoe", "bailingmoe2", "bloom", "chameleon", "chatglm-bpe", "codeshell", "cohere2moe",
    "command-r", "dbrx", "deepseek-coder", "deepseek-llm", "deepseek-r1-qwen", "deepseek-v3", "default", "exaone",
    "exaone-moe", "exaone4", "f2llmv2", "falcon", "falcon-h1", "falcon3", "gemma4", "gigachat", "glm4", "gpt-2",
    "gpt-4o", "gpt3-finnish", "granite-docling", "granite-embed-multi-311m", "granite-embed-multi-97m", "grok-2",
    "hunyuan", "hunyuan-dense", "hy_v4", "jais", "jais-2", "jina-de", "jina-es", "jina-v1-en", "jina-v2-code",
    "jina-v2-de", "jina-v2-es", "jina-v5-nano", "joyai-llm", "kanana2", "kimi-k2", "kormo", "laguna", "lfm2",
    "llada-moe", "llama-bpe", "llama-v3", "llama3", "llama4", "megrez", "mellum", "mellum2", "midm-2.0",
    "minerva-7b", "minicpm5", "minimax-m2", "modern-bert", "mpt", "olmo", "phi-2", "pixtral", "poro-chat", "qwen2",
    "qwen35", "refact", "roberta-bpe", "sarvam-moe", "seed-coder", "smaug-bpe", "smollm", "solar-open", "spark2_5",
    "stablelm2", "starcoder", "superbpe", "talkie", "tekken", "tiny_aya", "trillion", "ufakzeka", "viking",
    "whitespace", "youtu",
})
# fmt: on

# llama.cpp writes these expressions with a-z and A-Z.
ONLY_ASCII_HAS_CASE = ("tekken", "gpt-4o")


def require_known(name: str) -> None:
    """Raise SlothError for a name that llama.cpp does not know."""
    if name not in NAMES:
        raise SlothError(
            f"llama.cpp knows no pre-tokenizer {name!r}{nearest(name, NAMES)}; if the name is new, install llama.cpp, "
            "which is asked then"
        )


def steps_of(pre_tokenizer: Mapping[str, Any]) -> Steps:
    """The steps of a tokenizer.json's pre-tokenizer. Raises SlothError for one that llama.cpp has in no form."""
    steps: list[str] = []
    for part in pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]:
        kind = part["type"]
        if kind == "Split" and part["behavior"] in ("Isolated", "Removed") and "Regex" in part["pattern"]:
            # Removing what does not match is isolating what does.
            if part["invert"] == (part["behavior"] == "Removed"):
                steps.append(part["pattern"]["Regex"])
                continue
        elif kind == "Digits" and part["individual_digits"]:
            steps.append(DIGITS)
            continue
        elif kind == "ByteLevel" and not part["add_prefix_space"]:
            steps += [GPT2] if part.get("use_regex", True) else []
            continue
        raise SlothError(f"llama.cpp has no pre-tokenizer like {json.dumps(part, ensure_ascii=False)}")
    return tuple(steps)


def name_of(steps: Steps, ignore_merges: bool) -> str:
    """llama.cpp's name. Raises SlothError, with what was found and what comes nearest on real text, if it has none."""
    name = KNOWN.get((steps, ignore_merges))
    if name is not None:
        return name
    agreement = {known: _agreement(steps, those) for (those, _), known in KNOWN.items()}
    best, lines = max(agreement.items(), key=lambda item: item[1])
    raise SlothError(
        f"llama.cpp names no pre-tokenizer that splits by {' then '.join(steps)} with ignore_merges={ignore_merges}; "
        f"nearest is {best!r}, which splits {lines} of {len(PROBE)} lines of real text the same; "
        f"pre_tokenizer={best!r} takes it all the same"
    )


def _agreement(left: Steps, right: Steps) -> int:
    a, b = _splitter(left), _splitter(right)
    return sum(a.pre_tokenize_str(line) == b.pre_tokenize_str(line) for line in PROBE)


def _splitter(steps: Steps) -> Any:
    from tokenizers import Regex, pre_tokenizers

    parts = [
        pre_tokenizers.Digits(individual_digits=True)
        if step == DIGITS
        else pre_tokenizers.Split(Regex(step), behavior="isolated")
        for step in steps
    ]
    return pre_tokenizers.Sequence(parts)

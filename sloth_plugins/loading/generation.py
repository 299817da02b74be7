"""`model.fast_generate`: `generate` for texts or tokens, with sampling parameters by vLLM's names, on fused layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import SlothError, nearest
from .decoding import fast

if TYPE_CHECKING:
    import torch

# vLLM's name: transformers' name.
RENAMED = {
    **{"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "n": "num_return_sequences"},
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
}
# Those that `generate` has nothing for, and the value with which they do nothing.
WITHOUT = {"presence_penalty": 0.0, "frequency_penalty": 0.0}
KNOWN = (*RENAMED, "stop", "stop_token_ids", "seed", *WITHOUT)


def fast_generate(
    model: Any,
    prompts: str | Sequence[Any] | torch.Tensor | Mapping[str, Any],
    sampling_params: Mapping[str, Any] | Any = None,
    *,
    tokenizer: Any = None,
    **options: Any,
) -> Any:
    """Continue prompts, in one batch, padded on the left.

    Texts give texts, without the prompt and without special tokens; token ids (a list, a list of lists, a tensor
    [rows, tokens], or a tokenizer's output with `input_ids` and `attention_mask`) give lists of the new ids, through
    the end token if it came. One prompt that is no list or tensor of several gives one result, several a list.

    `sampling_params` is a mapping or an object with vLLM's names: temperature (0 is greedy), top_p, top_k, min_p,
    max_tokens, min_tokens, repetition_penalty, n (results of each prompt stand together), stop, stop_token_ids, seed.
    `options` go to `generate` and win. Raises SlothError for parameters that `generate` has nothing for.
    """
    import torch

    tokenizer = tokenizer if tokenizer is not None else getattr(model, "sloth_tokenizer", None)
    rows, is_text, is_one = _rows(prompts, tokenizer)
    if not rows or not all(rows):
        raise SlothError(f"fast_generate() takes one prompt or more, of at least one token each, not {prompts!r:.60}")
    given, seed, stop = _sampling(sampling_params, model)
    given |= options
    if stop:
        given |= {"stop_strings": stop, "tokenizer": tokenizer}
    ends = _ends(given.get("eos_token_id", model.generation_config.eos_token_id))
    padding = next((number for number in (model.generation_config.pad_token_id, *ends) if number is not None), 0)
    width = max(map(len, rows))
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    if seed is not None:
        torch.manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        with fast(model) as generate:
            made = generate(input_ids=ids, attention_mask=mask, **{"pad_token_id": padding, "use_cache": True, **given})
    finally:
        model.train(was_training)
    results: list[Any] = [_until(row, ends) for row in made[:, width:].tolist()]
    if is_text:
        results = [_before(tokenizer.decode(row, skip_special_tokens=True), stop) for row in results]
    return results[0] if is_one and len(results) == 1 else results


def _rows(prompts: Any, tokenizer: Any) -> tuple[list[list[int]], bool, bool]:
    """Token ids of each prompt; whether they came as text; whether it was a single one."""
    import torch

    if isinstance(prompts, str):
        rows, _, _ = _rows([prompts], tokenizer)
        return rows, True, True
    if isinstance(prompts, Mapping):
        ids = _listed(prompts["input_ids"])
        mask = _listed(prompts["attention_mask"]) if "attention_mask" in prompts else [[1] * len(row) for row in ids]
        pairs = (zip(row, kept, strict=True) for row, kept in zip(ids, mask, strict=True))
        return [[number for number, is_real in pair if is_real] for pair in pairs], False, False
    if isinstance(prompts, torch.Tensor):
        return _listed(prompts), False, prompts.dim() == 1
    prompts = list(prompts)
    if prompts and all(isinstance(prompt, str) for prompt in prompts):
        if tokenizer is None:
            raise SlothError("fast_generate() needs tokenizer= for text, since the model was not loaded with its own")
        # A chat template has written its first token.
        first = tokenizer.bos_token or None
        return (
            [
                tokenizer(text, add_special_tokens=not (first and text.startswith(first)))["input_ids"]
                for text in prompts
            ],
            True,
            False,
        )
    if prompts and all(isinstance(prompt, int) for prompt in prompts):
        return [prompts], False, True
    try:
        return [[int(number) for number in prompt] for prompt in prompts], False, False
    except (TypeError, ValueError):
        raise SlothError(
            f"fast_generate() takes texts or token ids, not {prompts!r:.60}; a chat becomes text by "
            "tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"
        ) from None


def _listed(ids: Any) -> list[list[int]]:
    """A tensor, a list or a list of lists as the last of them."""
    listed: list[Any] = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    return [listed] if listed and isinstance(listed[0], int) else [list(row) for row in listed]


def _sampling(params: Any, model: Any) -> tuple[dict[str, Any], int | None, list[str]]:
    """Options of `generate`, the seed, and the texts to stop at."""
    if params is None:
        return {}, None, []
    if isinstance(params, Mapping):
        unknown = next((name for name in params if name not in KNOWN), None)
        if unknown is not None:
            raise SlothError(
                f"sampling_params has {unknown!r}, which is none of {', '.join(KNOWN)}{nearest(unknown, KNOWN)} "
                "(options of generate() stand beside sampling_params)"
            )
        found = dict(params)
    else:
        found = {name: getattr(params, name) for name in KNOWN if hasattr(params, name)}
        if not found:
            raise SlothError(f"sampling_params is {params!r:.60}, which has none of {', '.join(KNOWN)}")
    for name, neutral in WITHOUT.items():
        if found.get(name) not in (None, neutral):
            raise SlothError(f"sampling_params has {name}={found[name]!r}, which generate() has nothing for")
    given = {new: found[old] for old, new in RENAMED.items() if found.get(old) is not None}
    is_greedy = given.get("temperature") == 0
    for name in ("temperature", "top_p", "top_k", "min_p") if is_greedy else ():
        given.pop(name, None)
    # vLLM samples unless the temperature is 0, and -1 means all tokens.
    given["do_sample"] = not is_greedy
    if given.get("top_k", 0) < 0:
        given["top_k"] = 0
    if found.get("stop_token_ids"):
        given["eos_token_id"] = [*_ends(model.generation_config.eos_token_id), *found["stop_token_ids"]]
    stop = found.get("stop") or []
    return given, found.get("seed"), [stop] if isinstance(stop, str) else list(stop)


def _ends(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _until(row: list[int], ends: Sequence[int]) -> list[int]:
    """The ids through the first end; what follows is padding."""
    return row[: next((index + 1 for index, number in enumerate(row) if number in ends), len(row))]


def _before(text: str, stop: Sequence[str]) -> str:
    return text[: min((text.find(end) for end in stop if end in text), default=len(text))]

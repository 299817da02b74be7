"""What a call of `generate` asks for, as far as it is asked for here; the rest is refused with a reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..blocks.projection import Refused

# Options that mean nothing where one token after another is sampled and only the tokens are returned.
_MEANINGLESS = frozenset(
    {"bos_token_id", "max_length", "transformers_version", "disable_compile", "compile_config", "return_legacy_cache"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to go on: at most `max_new_tokens` tokens a row, through one of `ends`, and `padding` behind it.

    Tokens are the most probable ones or, with `samples`, drawn from what the processors leave, by transformers' names.
    `copies` is how many rows each prompt gives.
    """

    max_new_tokens: int
    ends: tuple[int, ...]
    padding: int
    samples: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    copies: int = 1


_OWN = {
    "max_new_tokens", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "min_new_tokens", "num_return_sequences", "use_cache",
}  # fmt: skip


def read_settings(config: Any) -> Settings:
    """The settings of a GenerationConfig whose defaults are filled in. Raises `Refused` for one that is not known here.

    An option is not known that differs from what transformers does without it.
    """
    stock = dict(vars(type(config)()))
    stock |= getattr(config, "_get_default_generation_params", dict)()
    for name, value in vars(config).items():
        if name.startswith("_") or name in _OWN or name in _MEANINGLESS or value is None or value is False:
            continue
        if value != stock.get(name):
            raise Refused(f"{name}={value!r:.60} is set")
    if getattr(config, "use_cache", True) is False:
        raise Refused("use_cache=False is set")
    if not config.max_new_tokens:
        raise Refused("max_new_tokens is not given")
    ends = _ends(config.eos_token_id)
    padding = config.pad_token_id if config.pad_token_id is not None else ends[0] if ends else 0
    settings = Settings(
        max_new_tokens=config.max_new_tokens,
        ends=ends,
        padding=int(padding),
        samples=bool(config.do_sample),
        temperature=_or(config.temperature, 1.0),
        top_k=_or(config.top_k, 0),
        top_p=_or(config.top_p, 1.0),
        min_p=_or(config.min_p, 0.0),
        repetition_penalty=_or(config.repetition_penalty, 1.0),
        min_new_tokens=_or(config.min_new_tokens, 0),
        copies=_or(config.num_return_sequences, 1),
    )
    if settings.temperature <= 0 or settings.top_k < 0 or not 0 <= settings.top_p <= 1:
        # transformers has an error for each.
        raise Refused("a sampling parameter is out of its range")
    if not settings.samples and settings.copies > 1:
        raise Refused("several rows of a prompt are not sampled")
    return settings


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _ends(ids: Any) -> tuple[int, ...]:
    if ids is None:
        return ()
    if isinstance(ids, torch.Tensor):
        ids = ids.tolist()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def check_left_over(arguments: Mapping[str, Any]) -> None:
    """Raise `Refused` for an argument of `generate` that is given and not looked at here."""
    for name, value in arguments.items():
        if value is None or value is False or (isinstance(value, list | tuple | dict) and not value):
            continue
        raise Refused(f"{name} is given")

"""From scores to what stays in 16 bits, as transformers is told."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .measuring import LENGTH, SAMPLES, TRUTH, Measured, Measurement, measure
from .selection import Choice, budget_bytes, choose, grouped, skip_list
from .statistics import SCORES
from .text import BUILTIN

BUDGET = "10%"
SCORE = "fisher"
# From there on an input is beyond what is typical by so much that a block of 64 weights feels it.
OUTLIER = 100.0


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Which linear layers of a measured model stay in 16 bits, by a score, within a budget of bytes."""

    measurement: Measurement
    score: str
    budget: int
    kept: frozenset[str]

    @property
    def in_nats(self) -> bool:
        """Whether the score estimates KL divergence, in nats a token."""
        return self.score == TRUTH or any(score.name == self.score and score.in_nats for score in SCORES)

    @cached_property
    def skip(self) -> list[str]:
        """`llm_int8_skip_modules`."""
        return skip_list(self.kept, [linear.name for linear in self.measurement.linears], self.measurement.outside)

    @property
    def extra(self) -> int:
        """Bytes beyond those of the model all in 4 bits."""
        return sum(line.plain_bytes - line.packed_bytes for line in self.measurement.linears if line.name in self.kept)

    @property
    def total(self) -> int:
        """Bytes of the model."""
        return self.measurement.all_four_bit + self.extra

    def cost(self, *, all_four_bit: bool = False) -> float:
        """The sum of the scores of what is in 4 bits."""
        found = self.measurement.linears
        return sum(line.scores[self.score] for line in found if all_four_bit or line.name not in self.kept)

    @property
    def outliers(self) -> list[Measured]:
        """The linear layers with massive inputs, the most massive first."""
        found = [linear for linear in self.measurement.linears if linear.ratio >= OUTLIER]
        return sorted(found, key=lambda linear: -linear.ratio)


def decide(measurement: Measurement, budget: str = BUDGET, score: str = SCORE) -> Decision:
    """Keep in 16 bits what costs most in 4 by `score`, within `budget`: "10%" of the 4-bit model, or "600MiB".

    Projections of one input (q, k and v; gate and up) stay together. Raises SlothError for a budget that is none.
    """
    room = budget_bytes(budget, measurement.all_four_bit)
    by_name = {linear.name: linear for linear in measurement.linears}
    choices = []
    for names in grouped(by_name).values():
        parts = [by_name[name] for name in names]
        extra = sum(part.plain_bytes - part.packed_bytes for part in parts)
        choices.append(Choice(names=names, score=sum(part.scores[score] for part in parts), extra=extra))
    kept = frozenset(name for choice in choose(choices, room) for name in choice.names)
    return Decision(measurement=measurement, score=score, budget=room, kept=kept)


def dynamic_config(
    model: str | Path,
    *,
    budget: str = BUDGET,
    data: str | Path = BUILTIN,
    samples: int = SAMPLES,
    length: int = LENGTH,
    score: str = SCORE,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    cache: str | Path | None = None,
) -> Any:
    """The BitsAndBytesConfig by which stock `from_pretrained` loads a model in 4 bits, but for what matters most.

    `model` is a folder with config.json, safetensors and a tokenizer, or a model in the Hub's cache (nothing is
    downloaded). It is calibrated on `data` (a text file, or "builtin": Python's own documentation and source), with one
    decoder layer in memory at a time on `device` (the GPU where there is one). What is measured is kept in `cache`
    (`~/.cache/sloth-plugins/quantization`, or below XDG_CACHE_HOME), never beside the model: a second call for the same
    files, text and device, with any budget, takes a second. `budget` is the room for 16 bits, "10%" of the model all in
    4 bits or bytes such as "600MiB". `dtype` is what is computed in and what stays in 16 bits: the model's own where it
    has 16 bits, else bfloat16.

    The 4-bit values are then bitsandbytes' own, the nearest; `quantize`, and `FastLanguageModel.from_pretrained(...,
    load_in_4bit="dynamic")`, choose them by calibration as well.

    The config has NF4 with double quantisation, and in `llm_int8_skip_modules` the whole paths of all linear layers
    that stay in 16 bits and `lm_head`: the same modules on every version of transformers. Raises SlothError, a line for
    the user, for text that is too short or none, a model that is 4-bit already, and for unknown options.
    """
    from ..export.checkpoint import read_config
    from ..export.formats import dtype_of
    from .measuring import source_folder

    measurement = measure(
        model, data=data, samples=samples, length=length, score=score, dtype=dtype, device=device, cache=cache
    )
    return config_of(decide(measurement, budget, score), dtype_of(dtype, read_config(source_folder(model))))


def config_of(decision: Decision, compute: torch.dtype) -> Any:
    """The BitsAndBytesConfig that says it, for computing in a dtype."""
    from transformers import BitsAndBytesConfig

    from ..export.formats import NF4

    return BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=compute, llm_int8_skip_modules=decision.skip)

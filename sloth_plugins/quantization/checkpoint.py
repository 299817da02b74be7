"""A model quantised as was decided, in a folder that stock transformers, PEFT and TRL load."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..export import writing
from ..export.adapter import BASE_MARK
from ..export.card import CARD, card_of
from ..export.formats import FourBit, dtype_of
from ..export.merging import inputs_of, layout_of, write_config, write_index, write_shards
from ..export.sources import tokenizer_folder
from ..export.tokenizers import save_tokenizer
from ..export.weights import open_weights
from . import lora
from .calibration import Work
from .decision import BUDGET, SCORE, Decision, decide
from .measuring import LENGTH, SAMPLES, measure, source_folder, torch_device
from .packing import Packing
from .report import write_report
from .text import BUILTIN

SHARD = 2_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """What was written, and why."""

    folder: Path
    decision: Decision


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    budget: str = BUDGET,
    data: str | Path = BUILTIN,
    samples: int = SAMPLES,
    length: int = LENGTH,
    score: str = SCORE,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    init: str | None = None,
    rank: int = 16,
    cache: str | Path | None = None,
    force: bool = False,
    shard_bytes: int = SHARD,
) -> Quantised:
    """Write the model of `source` in NF4 into the folder `out`, all but what costs most in 4 bits within `budget`.

    Options are those of `dynamic_config`. With `init` ("qera", "svd", "loftq") `out/adapter` is a LoRA of `rank` that
    begins as what quantisation has lost; `load_with_adapter(out)` loads both. quantization_report.json, .txt and .png
    say what stays in 16 bits and why. Nothing is under the name `out` before all is written; an interrupted run goes on
    where it stopped. An earlier export is replaced only with `force`. Raises SlothError for what the user must act on.
    """
    out = Path(out)
    lora.check_init(init, rank)
    folder = source_folder(source)
    writing.check_target(out, [folder], force=force)
    place = torch_device(device)
    measurement = measure(
        folder, data=data, samples=samples, length=length, score=score, dtype=dtype, device=device, cache=cache
    )
    decision = decide(measurement, budget, score)
    weights = open_weights(folder)
    packing = Packing(dtype=dtype_of(dtype, weights.config))
    work = Work(measurement.inputs.parent)
    packed = [linear for linear in measurement.linears if linear.name not in decision.kept]
    if init is not None:
        lora.initialise(weights, packed, work.read("inputs"), init, rank, packing, place, work)
    shifts = {linear.weight: lora.stored_name(init, rank, linear.name) for linear in packed} if init == "loftq" else {}
    form = _Form(weights.base, weights.config, packing.dtype, decision.skip, place, shifts, work)
    layout = layout_of(weights, form, shard_bytes)
    inputs = inputs_of([folder], layout, f"{decision.skip} {init} {rank}", packing.dtype)
    with writing.Staged(out, inputs).open() as partial:
        files = write_shards(weights, form, layout, partial, "quantising")
        write_index(files, partial)
        mark = _mark(sorted(set(files.values())))
        setattr(weights.config, BASE_MARK, mark)
        write_config(weights, form, packing.dtype, partial)
        save_tokenizer(None, tokenizer_folder(folder), partial)
        if init is not None:
            kept = set(decision.kept)
            lora.save_adapter(partial / lora.ADAPTER, out.resolve(), mark, measurement.linears, kept, work, init, rank)
        write_report(decision, partial, data=str(data), init=f"{init}, rank {rank}" if init else None)
        card_of(folder, "dynamic 4-bit: NF4, but for the linear layers that it costs most, which stay in 16 bits").save(
            partial / CARD
        )
    return Quantised(folder=out, decision=decision)


class _Form(FourBit):
    """4 bits but for what was decided; for loftq of a weight from which the adapter's last product is taken."""

    def __init__(
        self,
        base: Any,
        config: Any,
        dtype: torch.dtype,
        skip: list[str],
        device: torch.device,
        shifts: dict[str, str],
        work: Work,
    ) -> None:
        super().__init__(base, config, dtype, skip=skip, device=device)
        self._shifts, self._work = shifts, work

    def stored(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `FourBit.stored`."""
        if name in self._shifts:
            factors = self._work.read(self._shifts[name])
            tensor = torch.addmm(tensor.float(), factors["shift.B"], factors["shift.A"], alpha=-1)
        return super().stored(name, tensor)


def _mark(files: list[Path]) -> str:
    """A name for the very weights that were written."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]

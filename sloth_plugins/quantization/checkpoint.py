"""A model quantised as was decided, in a folder that stock transformers, PEFT and TRL load."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import check_known
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
from .measuring import LENGTH, SAMPLES, measure, rows_of, source_folder, torch_device
from .packing import Packing
from .report import write_report
from .rounding_pass import CALIBRATED, NEAREST, ROUNDINGS, chosen_values, forget
from .text import BUILTIN

SHARD = 2_000_000_000
WHAT = "dynamic 4-bit: NF4, but for the linear layers that it costs most, which stay in 16 bits"


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
    rounding: str | None = None,
    init: str | None = None,
    rank: int = 16,
    cache: str | Path | None = None,
    force: bool = False,
    shard_bytes: int = SHARD,
) -> Quantised:
    """Write the model of `source` in NF4 into the folder `out`, all but what costs most in 4 bits within `budget`.

    Options are those of `dynamic_config`. `rounding` "calibrated", the default, chooses the 4-bit values of each layer
    by what it computes of the same text; "nearest" rounds each weight alone. With `init` ("qera", "svd", "loftq"),
    which goes with the nearest, `out/adapter` is a LoRA of `rank` that begins as what quantisation has lost;
    `load_with_adapter(out)` loads both. quantization_report.json, .txt and .png say what stays in 16 bits and why.
    Nothing is under the name `out` before all is written; an interrupted run goes on where it stopped. An earlier
    export is replaced only with `force`. Raises SlothError for what the user must act on.
    """
    out = Path(out)
    rounding = rounding or (CALIBRATED if init is None else NEAREST)
    check_known("rounding", rounding, ROUNDINGS)
    lora.check_init(init, rank, rounding)
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
    facts = {"data": str(data), "rounding": rounding, "init": f"{init}, rank {rank}" if init else None}
    # Others that write from the same measurement make and remove the same files.
    with work.alone():
        values: dict[str, str] = {}
        if rounding == CALIBRATED and packed:
            rows = rows_of(folder, data, samples, length)
            paths = [linear.name for linear in packed]
            values = chosen_values(weights, rows, paths, decision.kept, packing, place, work)
        start = None if init is None else lora.Start(init, rank)
        if start is not None:
            lora.initialise(weights, packed, work.read("inputs"), start, packing, place, work)
        shifts = {linear.weight: start.file(linear.name) for linear in packed} if start and init == "loftq" else {}
        chosen = {linear.weight: values[linear.name] for linear in packed if linear.name in values}
        form = _Form(weights.base, weights.config, packing.dtype, decision.skip, place, shifts, chosen, work)
        layout = layout_of(weights, form, shard_bytes)
        # Chosen values depend on the text as well.
        made_of = f"{decision.skip} {init} {rank} {work.folder.name if values else NEAREST}"
        with writing.Staged(out, inputs_of([folder], layout, made_of, packing.dtype)).open() as partial:
            files = write_shards(weights, form, layout, partial, "quantising")
            write_index(files, partial)
            mark = _mark(sorted(set(files.values())))
            setattr(weights.config, BASE_MARK, mark)
            write_config(weights, form, packing.dtype, partial)
            save_tokenizer(None, tokenizer_folder(folder), partial)
            if start is not None:
                kept = set(decision.kept)
                adapter = partial / lora.ADAPTER
                lora.save_adapter(adapter, out.resolve(), mark, measurement.linears, kept, work, start)
            write_report(decision, partial, **facts)
            card_of(folder, WHAT).save(partial / CARD)
        if values:
            forget(work)
    return Quantised(folder=out, decision=decision)


class _Form(FourBit):
    """4 bits but for what was decided; for loftq of a weight from which the adapter's last product is taken.

    `shifts` and `values` are the files, by the weight's name, of those products and of 4-bit values that were chosen.
    """

    def __init__(
        self,
        base: Any,
        config: Any,
        dtype: torch.dtype,
        skip: list[str],
        device: torch.device,
        shifts: dict[str, str],
        values: dict[str, str],
        work: Work,
    ) -> None:
        super().__init__(base, config, dtype, skip=skip, device=device)
        self._shifts, self._values, self._work = shifts, values, work

    def stored(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `FourBit.stored`."""
        if name in self._shifts:
            factors = self._work.read(self._shifts[name])
            tensor = torch.addmm(tensor.float(), factors["shift.B"], factors["shift.A"], alpha=-1)
        stored = super().stored(name, tensor)
        if name in self._values:
            stored[name] = self._work.read(self._values[name])["data"]
        return stored


def _mark(files: list[Path]) -> str:
    """A name for the very weights that were written."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]

"""A LoRA adapter that begins as the low-rank part of what quantisation has lost, instead of as nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SlothError, check_known
from ..export.adapter import BASE_MARK, CONFIG, TENSORS, base_mark_of
from ..export.progress import progress
from ..export.weights import Weights
from .calibration import Work
from .packing import Packing
from .rounding_pass import NEAREST

if TYPE_CHECKING:
    from .measuring import Measured

INITS = ("qera", "svd", "loftq")
ADAPTER = "adapter"
"""The adapter's folder within that of its base."""
LOFTQ_ROUNDS = 5
OVERSAMPLING = 16


@dataclass(frozen=True)
class Start:
    """How adapters begin: by which initialisation, of which rank."""

    init: str
    rank: int

    def file(self, path: str) -> str:
        """What `initialise` calls its file for a linear layer."""
        return f"lora-{self.init}-{self.rank}/{path}"


def check_init(init: str | None, rank: int, rounding: str) -> None:
    """Raise SlothError for an initialisation that there is not, a rank below 1, or what does not go together.

    What chosen values lose lies where inputs are small. An adapter that begins there learns slowly: after fine-tuning
    the loss was 0.03 higher than without one.
    """
    if init is not None:
        check_known("init", init, INITS)
    if rank < 1:
        raise SlothError(f"rank {rank} is no rank of an adapter; 16 is usual")
    if init is not None and rounding != NEAREST:
        raise SlothError(f"init {init} makes up for rounding {NEAREST}; leave out one of init and rounding {rounding}")


def initialise(
    weights: Weights,
    linears: list[Measured],
    inputs: Mapping[str, torch.Tensor],
    start: Start,
    packing: Packing,
    device: torch.device,
    work: Work,
) -> None:
    """Leave `start.file(PATH)` in `work` for each of `linears`, which are those in 4 bits; done ones are kept.

    A file has `A` [rank, columns] and `B` [rows, rank], fp32, whose product is what is added to the 4-bit weight, and
    `shift`, of both shapes: what was subtracted from the weight before it was quantised, which is not zero for loftq
    alone. "svd" is the best approximation of W - Q in rank r; "qera" that of its effect on inputs with the mean squares
    of `inputs` (QERA-approx, Zhang et al. 2024, arXiv:2410.06040, theorem 2 with diagonal covariance); "loftq" takes
    turns between quantising W - BA and the approximation of what is left (Li et al. 2023, arXiv:2310.08659).
    """
    with progress("initialising adapters", sum(linear.plain_bytes for linear in linears)) as advance:
        for linear in linears:
            name = start.file(linear.name)
            if not work.has(name):
                weight = weights.read(linear.weight).to(device, torch.float32)
                scale = inputs[linear.name].to(device).sqrt() if start.init == "qera" else torch.ones_like(weight[0])
                work.write(name, _factors(weight, scale, start, packing))
            advance(linear.plain_bytes)


def _factors(weight: torch.Tensor, scale: torch.Tensor, start: Start, packing: Packing) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    down, up = weight.new_zeros(start.rank, columns), weight.new_zeros(rows, start.rank)
    for _ in range(LOFTQ_ROUNDS if start.init == "loftq" else 1):
        shift_down, shift_up = down, up
        lost = weight - packing.pack(torch.addmm(weight, up, down, alpha=-1)).dequantised(weight)
        down, up = _low_rank(lost, scale, start.rank)
    return {"A": down, "B": up, "shift.A": shift_down, "shift.B": shift_up}


def _low_rank(lost: torch.Tensor, scale: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, columns] and B [rows, rank] that minimise the Frobenius norm of (lost - BA) diag(scale).

    Of all ways to share the product out, that in which each row of A is as long as PEFT draws them. An optimizer like
    Adam moves BA by about its rate times |A|, and what is lost is small: evenly shared out it would leave A a fraction
    of that, and adapters that learn slowly.
    """
    # An input that never was anything else than zero has no say; a little of the mean keeps its column finite.
    scale = scale.clamp_min(1e-4 * float(scale.mean()))
    rows, columns = lost.shape
    wanted = min(rank, rows, columns)
    with torch.random.fork_rng(devices=[lost.device] if lost.is_cuda else []):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(lost * scale, q=min(wanted + OVERSAMPLING, rows, columns), niter=4)
    # Beyond the weight's own rank there is nothing to cancel.
    down, up = (part.to(lost) for part in _from_nothing(rows, columns, rank, torch.Generator().manual_seed(0)))
    directions = right.T[:wanted] / scale
    lengths = directions.norm(dim=1) * 3**0.5
    down[:wanted] = directions / lengths[:, None]
    up[:, :wanted] = left[:, :wanted] * values[:wanted] * lengths
    return down, up


def _from_nothing(rows: int, columns: int, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, columns] and B [rows, rank] as PEFT has them: A random, of rows about 3^-0.5 long, and B zero."""
    bound = columns**-0.5  # kaiming_uniform_ with a = sqrt(5)
    return (torch.rand(rank, columns, generator=generator) * 2 - 1) * bound, torch.zeros(rows, rank)


def save_adapter(
    folder: Path, base: Path, mark: str, linears: list[Measured], kept: set[str], work: Work, start: Start
) -> None:
    """A PEFT adapter for all `linears` in `folder`, which names `base` and carries its mark.

    The layers of `kept`, in 16 bits, have nothing to cancel and begin as PEFT has it: A random and B zero.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    generator, rank = torch.Generator().manual_seed(0), start.rank
    tensors: dict[str, torch.Tensor] = {}
    for linear in linears:
        place = f"base_model.model.{linear.name}"
        if linear.name in kept:
            down, up = _from_nothing(linear.rows, linear.columns, rank, generator)
        else:
            factors = work.read(start.file(linear.name))
            down, up = factors["A"], factors["B"]
        tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"] = down, up
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted({linear.name.rpartition(".")[2] for linear in linears}),
        alpha_pattern={f"{linears[0].name}|{BASE_MARK}_{mark}": rank},
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def load_with_adapter(folder: str | Path, **options: Any) -> Any:
    """The 4-bit model in `folder` with the adapter that was made for it, a PeftModel ready to train.

    `options` go to `AutoModelForCausalLM.from_pretrained`. Raises SlothError where the two are not of one making.
    """
    import json

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    if not (folder / ADAPTER / CONFIG).is_file():
        raise SlothError(f"{folder} has no {ADAPTER}; write it by `sloth-plugins quantize --lora-init qera`")
    mark = base_mark_of(json.loads((folder / ADAPTER / CONFIG).read_text(encoding="utf-8")))
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if mark is None or getattr(model.config, BASE_MARK, None) != mark:
        raise SlothError(f"{folder / ADAPTER} was not made for the model in {folder}; quantise it again")
    return PeftModel.from_pretrained(model, folder / ADAPTER, is_trainable=True)

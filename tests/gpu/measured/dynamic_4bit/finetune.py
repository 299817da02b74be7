"""Loss after LoRA fine-tuning on other text (C and C++ headers): 16-bit, NF4, dynamic 4-bit, and that with each init.

Every variant of a seed sees the same rows in the same order; adapters are on all linear layers, of the same rank. The
bases are loaded by stock transformers, the inits are what `quantize(..., init=...)` has written.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from .common import DEVICE, PROJECTIONS, Work, calibrated, parser, record, timed, without_bars

INITS = ("qera", "svd", "loftq")
VARIANTS = ("16-bit", "NF4", "dynamic, nearest values", "dynamic", *(f"dynamic, {init}" for init in INITS))
BUDGET = "10%"


def options(text: str | None) -> Any:
    """Of this part and of requantize.py, which fine-tunes in the same way."""
    made = parser(text)
    made.add_argument("--model", required=True, help="seed0, outliers")
    made.add_argument("--steps", type=int, default=150)
    made.add_argument("--batch", type=int, default=16, help="rows of a step")
    made.add_argument("--rows", type=int, default=128, help="of held-out text")
    made.add_argument("--length", type=int, default=512)
    made.add_argument("--samples", type=int, default=64, help="rows to calibrate on")
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--rate", type=float, default=5e-4)
    return made


def loaded(folder: Any, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": str(DEVICE)}, **more)


def with_adapter(model: Any, rank: int) -> Any:
    """PEFT's own LoRA on all projections; the same draw for every variant."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def variant(name: str, work: Work, given: Any) -> Any:
    """A model of VARIANTS, ready to train."""
    from sloth_plugins.quantization import dynamic_config, load_with_adapter, quantize

    folder = work.model(given.model)
    measured = calibrated(work, samples=given.samples) | {"budget": BUDGET}
    if name == "16-bit":
        return with_adapter(loaded(folder), given.rank)
    if name == "NF4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return with_adapter(loaded(folder, quantization_config=config), given.rank)
    if name == "dynamic, nearest values":
        return with_adapter(loaded(folder, quantization_config=dynamic_config(folder, **measured)), given.rank)
    init = name.partition(", ")[2] or None
    out = work.folder / "quantised" / f"{given.model}-{init}"
    made = quantize(folder, out, init=init, rank=given.rank, force=True, **measured)
    if init is None:
        return with_adapter(loaded(made.folder), given.rank)
    return load_with_adapter(made.folder, dtype=torch.bfloat16, device_map={"": str(DEVICE)})


def losses(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each row [n, tokens], nats a token, fp32 [n]."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        logits = model(input_ids=rows[:, :-1]).logits
    return functional.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction="none").mean(1)


@torch.no_grad()
def held_out_losses(model: Any, rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([losses(model, part) for part in rows.split(16)]).double().cpu()


def tune(model: Any, rows: torch.Tensor, given: Any, between: Callable[[int], None] = lambda step: None) -> list[float]:
    """Train the adapter by AdamW under a cosine, the same rows for every model; `between` is called after each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=given.rate, weight_decay=0.0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    found = []
    for step in range(given.steps):
        rate = given.rate * min(1.0, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / given.steps))
        optimizer.param_groups[0]["lr"] = rate
        at = torch.arange(step * given.batch, (step + 1) * given.batch) % len(order)
        loss = losses(model, rows[order[at].to(rows.device)]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
        between(step + 1)
    return torch.stack(found).tolist()


def main() -> None:
    made = options(__doc__)
    made.add_argument("--variants", nargs="+", default=list(VARIANTS))
    given = made.parse_args()
    without_bars()
    work = Work(given.work)
    rows = work.rows("tune", given.length + 1)
    held_out = work.rows("tune_held_out", given.length + 1, given.rows)
    plain = None
    for name in given.variants:
        # Nothing drops out; bitsandbytes repacks weights for inference on a CPU where a model is in eval mode.
        model = variant(name, work, given).train()
        before = held_out_losses(model, held_out)
        with timed(given.results, "fine-tuning", model=given.model, variant=name):
            seen = tune(model, rows, given)
        after = held_out_losses(model, held_out)
        plain = after if name == "16-bit" else plain
        values = {"before": float(before.mean()), "after": float(after.mean()), "last_train_loss": sum(seen[-10:]) / 10}
        if plain is not None:
            gap = after - plain
            values |= {"gap": float(gap.mean()), "gap_error": float(gap.std() / max(1, len(gap)) ** 0.5)}
        record(given.results, "finetune", model=given.model, variant=name, steps=given.steps, **values)
        del model
        gc.collect()


if __name__ == "__main__":
    main()

"""Time of a training step with patches where a block's projections are partly in NF4 and partly in bf16.

Eight layers of Llama-3.1-8B's shape, random weights, LoRA on all projections, no gradient checkpointing: all in bf16,
all in NF4, what the selection chooses at +10 %, and two mixes that are in every layer. A mix should take no longer than
the slower of the two pure ones. How many layers ran fused is counted, so that no fallback is timed for a block.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from .common import DEVICE, calibrated, parser, record, timed, without_bars
from .common import Work as Folders
from .finetune import loaded, with_adapter
from .shape import LLAMA_8B, TINY, readable, write_model

MIXES = {
    "qkv and down in bf16": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"),
    "q and gate in bf16": ("self_attn.q_proj", "mlp.gate_proj"),
}


def skip_lists(given: Any, work: Folders, folder: Any) -> dict[str, list[str] | None]:
    """What stays in 16 bits, by variant; None where nothing is quantised."""
    from sloth_plugins.quantization import dynamic_config

    with timed(given.results, "blocks: choosing"):
        chosen = dynamic_config(folder, budget="10%", **calibrated(work, samples=given.samples))
    found: dict[str, list[str] | None] = {"all bf16": None, "all NF4": ["lm_head"]}
    found["as chosen"] = chosen.llm_int8_skip_modules
    for name, leaves in MIXES.items():
        paths = [f"model.layers.{layer}.{leaf}" for layer in range(given.layers) for leaf in leaves]
        found[name] = [*sorted(paths), "lm_head"]
    return found


def seconds_of_steps(model: Any, given: Any) -> list[float]:
    """Of each step after the warm ones, by a clock that waits for the device."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=DEVICE.type == "cuda")
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 8192, (given.batch, given.length), generator=draw).to(DEVICE)
    moments = []
    for step in range(given.warm + given.steps + 1):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        if step == given.warm and DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if step >= given.warm:
            moments.append(time.perf_counter())
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [b - a for a, b in pairwise(moments)]


def counted() -> list[Any]:
    """One entry for each layer's forward that runs fused from now on."""
    from sloth_plugins.patches.blocks import decoder_layer

    seen: list[Any] = []
    run = decoder_layer._Fused.run
    decoder_layer._Fused.run = lambda self, *args: (seen.append(None), run(self, *args))[1]
    return seen


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--length", type=int, default=2048)
    options.add_argument("--warm", type=int, default=6, help="steps before those that count")
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--samples", type=int, default=8, help="rows to calibrate on")
    options.add_argument("--stock", action="store_true", help="time each model without patches, too")
    options.add_argument("--tiny", action="store_true", help="another shape, to try this script")
    given = options.parse_args()
    logging.basicConfig(level=logging.WARNING)
    without_bars()
    from bitsandbytes.nn import Linear4bit

    from sloth_plugins import patch

    work = Folders(given.work)
    folder = given.work / "models" / ("blocks-tiny" if given.tiny else f"llama-8b-{given.layers}-layers")
    if not (folder / "config.json").is_file():
        with timed(given.results, "blocks: writing random weights"):
            write_model(folder, TINY if given.tiny else LLAMA_8B, given.layers)
    folder = readable(folder, work)
    fused = counted()
    for name, skip in skip_lists(given, work, folder).items():
        more = {}
        if skip is not None:
            more["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
                llm_int8_skip_modules=skip,
            )
        model = with_adapter(loaded(folder, **more), 16).train()
        four_bit = sum(type(module) is Linear4bit for module in model.modules())
        for patched in (False, True) if given.stock else (True,):
            if patched:
                patch(model)
            fused.clear()
            times = seconds_of_steps(model, given)
            values = {"ms": 1e3 * statistics.median(times), "ms_least": 1e3 * min(times), "ms_most": 1e3 * max(times)}
            if DEVICE.type == "cuda":
                values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            per_step = len(fused) / (given.warm + given.steps + 1)
            counts = {"four_bit": four_bit, "fused_layers_a_step": per_step, "layers": given.layers}
            record(given.results, "blocks", variant=name, patched=patched, **counts, **values)
        del model
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

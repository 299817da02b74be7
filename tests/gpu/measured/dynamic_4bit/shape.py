"""Time and peak memory of quantising a model of Llama-3.1-8B's shape, random weights, under a cap of GPU memory.

`--write` makes the folder where there is none; of fewer layers with `--layers`, by which a slow machine's time can be
told. `--device cpu` is the variant for a machine without a GPU. Host memory is the process's largest resident set.
"""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from .common import DEVICE, Work, parser, record, timed, without_bars

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}
TINY = LLAMA_8B | {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
}
GIB = 2**30


def write_model(folder: Path, sizes: dict[str, Any], layers: int) -> None:
    """Random bf16 weights, a file for each decoder layer and one for the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**sizes, num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        number = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        parts.setdefault(f"model-{number}.safetensors", []).append(name)
    draw = torch.Generator(DEVICE).manual_seed(0)
    for file, names in parts.items():
        tensors = {}
        for name in names:
            made = torch.empty(shapes[name], device=DEVICE, dtype=torch.bfloat16)
            made = made.fill_(1) if made.dim() == 1 else made.normal_(0, 0.02, generator=draw)
            tensors[name] = made.cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {name: file for file, names in parts.items() for name in names}
    sizes_written = {"total_size": 2 * sum(shape.numel() for shape in shapes.values())}
    text = json.dumps({"metadata": sizes_written, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    config.save_pretrained(folder)


def readable(folder: Path, work: Work) -> Path:
    """The model's folder, or one beside ours of links to its files where it has no tokenizer."""
    if (folder / "tokenizer.json").is_file():
        return folder
    linked = work.model("shape")
    shutil.rmtree(linked, ignore_errors=True)
    linked.mkdir(parents=True)
    for file in folder.resolve().iterdir():
        (linked / file.name).symlink_to(file)
    AutoTokenizer.from_pretrained(work.tokenizer).save_pretrained(linked)
    return linked


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, default=Path("/tmp/models/llama-8b"))
    options.add_argument("--write", action="store_true", help="where the folder is not there")
    options.add_argument("--layers", type=int, default=32, help="of what is written")
    options.add_argument("--tiny", action="store_true", help="write a model of another shape, to try this script")
    options.add_argument("--device", default=DEVICE.type, choices=("cpu", "cuda"))
    options.add_argument("--cap", type=float, default=12, help="GiB of GPU memory")
    options.add_argument("--roundings", nargs="+", default=["nearest", "calibrated"], help="of 4-bit values")
    options.add_argument("--samples", type=int, default=64)
    options.add_argument("--length", type=int, default=512)
    given = options.parse_args()
    without_bars()
    from sloth_plugins.quantization import measure, quantize

    work = Work(given.work)
    if given.write and not (given.model / "config.json").is_file():
        with timed(given.results, "writing random weights"):
            write_model(given.model, TINY if given.tiny else LLAMA_8B, given.layers)
    if not (given.model / "config.json").is_file():
        raise SystemExit(f"{given.model} is no model's folder; --write makes one of random weights")
    model = readable(given.model, work)
    on_card = given.device == "cuda"
    if on_card:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, given.cap * GIB / total))
        torch.cuda.reset_peak_memory_stats()
    cache, out = work.folder / "cache-shape", work.folder / "shape-4bit"
    shutil.rmtree(cache, ignore_errors=True)
    fixed = {"data": work.calibration, "samples": given.samples, "length": given.length, "device": given.device}
    kind = {
        "device": given.device,
        "layers": json.loads((given.model / "config.json").read_text())["num_hidden_layers"],
    }
    with timed(given.results, "shape: calibration", **kind):
        measure(model, cache=cache, **fixed)
    made = None
    for rounding in given.roundings:
        with timed(given.results, f"shape: choosing and writing, {rounding} values", **kind):
            made = quantize(model, out, budget="10%", cache=cache, force=True, rounding=rounding, **fixed)
    assert made is not None
    values = {"cap_gib": given.cap if on_card else None, "tokens": given.samples * given.length}
    values |= {"bytes": made.decision.total, "all_four_bit": made.decision.measurement.all_four_bit}
    values["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    if on_card:
        values["device"] = torch.cuda.get_device_name()
        values["gpu_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        values["gpu_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    record(given.results, "shape", **kind | values)
    shutil.rmtree(out)
    shutil.rmtree(cache)


if __name__ == "__main__":
    main()

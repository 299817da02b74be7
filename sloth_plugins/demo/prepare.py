"""What the demo trains: a byte-level BPE tokenizer and a small Llama, made from the pairs of `data.py` in seconds.

Runs as a program of its own (`python -m sloth_plugins.demo.prepare --out DIR`), so that the process that compares the
runs never imports torch. Prints `step k/n` lines, from which the caller draws its progress bar.
"""

import argparse
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sloth_plugins.demo.data import Pair, standard_library_pairs

SPECIAL_TOKENS = {"pad_token": "<|pad|>", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the model and of both trainings. Lengths in tokens, batches in sequences.

    The fine-tuning sees few examples several times, so that its loss falls within a few steps.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 4096
    sequence: int
    pretrain_batch: int
    pretrain_steps: int
    pretrain_rate: float
    tune_batch: int
    tune_steps: int
    tune_rate: float
    tune_examples: int

    def __str__(self) -> str:
        return (
            f"Llama, hidden {self.hidden}, {self.layers} layers, {self.heads}/{self.kv_heads} heads, "
            f"intermediate {self.intermediate}, vocabulary {self.vocabulary}, "
            f"sequences up to {self.sequence}, batch {self.tune_batch}"
        )


# Intermediate sizes are no powers of two on purpose: the tails of kernels are exercised as real models exercise them.
CPU_SHAPE = Shape(
    hidden=192, layers=4, heads=6, kv_heads=2, intermediate=528,
    sequence=128, pretrain_batch=16, pretrain_steps=60, pretrain_rate=3e-3,
    tune_batch=16, tune_steps=30, tune_rate=5e-3, tune_examples=32,
)  # fmt: skip
GPU_SHAPE = Shape(
    hidden=1024, layers=16, heads=16, kv_heads=4, intermediate=2752,
    sequence=512, pretrain_batch=32, pretrain_steps=200, pretrain_rate=6e-4,
    tune_batch=16, tune_steps=40, tune_rate=1e-3, tune_examples=64,
)  # fmt: skip


def build_tokenizer(pairs: Sequence[Pair], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens: any text survives encoding and decoding unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL_TOKENS.values(), "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((text for pair in pairs for text in (pair["instruction"], pair["response"])), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, padding_side="right", clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(shape: Shape, tokenizer: Any) -> Any:
    """A Llama with random weights, the same for the same shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4 * shape.sequence,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(model: Any, tokenizer: Any, pairs: Sequence[Pair], shape: Shape, device: str) -> list[float]:
    """Train all weights as a plain causal language model on the running text; returns the loss of every step."""
    import torch

    text = tokenizer.eos_token.join(f"{pair['instruction']}\n{pair['response']}" for pair in pairs)
    stream = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = torch.arange(shape.sequence)
    generator = torch.Generator().manual_seed(SEED)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.pretrain_rate, weight_decay=0.01)
    steps = shape.pretrain_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    losses = []
    for step in range(1, steps + 1):
        starts = torch.randint(len(stream) - shape.sequence, (shape.pretrain_batch, 1), generator=generator)
        tokens = stream[starts + windows].to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}/{steps} loss {losses[-1]:.4f}", flush=True)
    return losses


def prepare(out: Path, shape: Shape, device: str, force: bool = False) -> dict[str, Any]:
    """Fill `out/model` (weights, tokenizer, pairs.jsonl, prepared.json) and return what prepared.json says.

    An `out/model` made for the same shape, device and Python version is kept, unless `force`. The folder is made beside
    the old one and takes its place only when whole.
    """
    folder, made = out / "model", out / "model.new"
    key = {"shape": asdict(shape), "device": device, "python": platform.python_version()}
    described = folder / "prepared.json"
    if described.exists() and not force:
        previous: dict[str, Any] = json.loads(described.read_text())
        if previous["key"] == key:
            return previous

    began = time.perf_counter()
    pairs = standard_library_pairs()
    print(f"{len(pairs)} pairs of instruction and response", flush=True)
    tokenizer = build_tokenizer(pairs, shape.vocabulary)
    model = build_model(shape, tokenizer)
    # Every second pair is kept from the model, so that the fine-tuning has something new to learn.
    losses = pretrain(model, tokenizer, pairs[::2], shape, device)

    shutil.rmtree(made, ignore_errors=True)
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    (made / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs[1::2]))
    prepared = {
        "key": key,
        "description": str(shape),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pairs": len(pairs),
        "losses": losses,
        "seconds": time.perf_counter() - began,
    }
    (made / "prepared.json").write_text(json.dumps(prepared, indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    made.rename(folder)
    return prepared


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the shape that suits this machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="make the model anew even if one is there")
    options = parser.parse_args(arguments)

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepared = prepare(options.out, GPU_SHAPE if device == "cuda" else CPU_SHAPE, device, options.force)
    print(f"{prepared['description']}, {prepared['parameters']:,} parameters, made in {prepared['seconds']:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

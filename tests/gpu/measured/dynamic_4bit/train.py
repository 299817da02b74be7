"""Three seeds of a small Llama, trained on local text, and the first of them with outlier channels.

The learning rate falls as a cosine of the time that is left, so that every seed takes as long as it is given and ends
where its loss has flattened; the curve goes to the results. Layers are compiled one by one, which is quick as they are
alike. Weights are trained in fp32 under bf16 autocast and saved in bf16.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from .common import DEVICE, Work, parser, record, timed

# Powers of two, so that scaling by them is exact in every format.
OUTLIER_SCALE = 64.0
OUTLIER_CHANNELS = 8
CURVE_POINTS = 20
MOST_SKIPPED = 5


def build(given: Any, tokenizer: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.hidden,
        intermediate_size=given.intermediate,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64,
        num_key_value_heads=max(1, given.hidden // 128),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def loss_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood, nats a token, of rows [n, tokens]."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        logits = model(input_ids=rows[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Any, rows: torch.Tensor, size: int) -> float:
    return sum(float(loss_of(model, part)) * len(part) for part in rows.split(size)) / len(rows)


def train(model: Any, rows: torch.Tensor, held_out: torch.Tensor, seed: int, given: Any) -> None:
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=DEVICE.type == "cuda")
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=draw)
    # Compiled before the clock starts.
    held_out_loss(model, held_out[: given.micro], given.micro)
    loss_of(model, rows[: given.micro]).backward()
    optimizer.zero_grad()
    began, step, at, point, skipped = time.perf_counter(), 0, 0, 0, 0
    recent: list[float] = []
    done = 0.0
    while done < 1:
        rate = given.rate * min(1.0, done / 0.05 + 0.01) * (0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        for _ in range(given.batch // given.micro):
            if at + given.micro > len(order):
                order, at = torch.randperm(len(rows), generator=draw), 0
            part = rows[order[at : at + given.micro].to(rows.device)]
            at += given.micro
            loss = loss_of(model, part) * given.micro / given.batch
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step += 1
        if torch.isfinite(norm):
            optimizer.step()
            recent.append(float(total))
        else:
            skipped += 1
            if skipped > MOST_SKIPPED:
                raise SystemExit(f"seed {seed}: {skipped} of {step} steps had a gradient that is not finite")
        optimizer.zero_grad()
        elapsed = time.perf_counter() - began
        done = min(1.0, step / given.steps if given.steps else elapsed / given.seconds)
        if done >= (point + 1) / CURVE_POINTS or done == 1:
            point = int(done * CURVE_POINTS)
            values = {"step": step, "tokens": step * given.batch * given.length, "seconds": round(elapsed, 1)}
            values |= {"train_loss": sum(recent) / max(1, len(recent)), "share": round(done, 3), "skipped": skipped}
            values["held_out_loss"] = held_out_loss(model, held_out, given.micro)
            record(given.results, "curve", seed=seed, **values)
            recent.clear()


@torch.no_grad()
def with_outliers(model: Any, every: int = 4) -> None:
    """Give some channels of every `every`th layer inputs 64 times as large, and weights that take it back.

    The weight of a norm grows where the columns of the projections after it shrink, and the rows of up_proj where the
    columns of down_proj do: by powers of two, so that the function is the same to the last bit.
    """
    draw = torch.Generator().manual_seed(0)
    config = model.config
    for layer in model.model.layers[1::every]:
        attention, mlp = layer.self_attn, layer.mlp
        pairs = (
            (layer.input_layernorm.weight, [attention.q_proj, attention.k_proj, attention.v_proj], config.hidden_size),
            (layer.post_attention_layernorm.weight, [mlp.gate_proj, mlp.up_proj], config.hidden_size),
            (mlp.up_proj.weight, [mlp.down_proj], config.intermediate_size),
        )
        for grown, readers, width in pairs:
            channels = torch.randperm(width, generator=draw)[:OUTLIER_CHANNELS]
            grown[channels] *= OUTLIER_SCALE
            for reader in readers:
                reader.weight[:, channels] /= OUTLIER_SCALE


def save_outliers(work: Work, given: Any, rows: torch.Tensor) -> None:
    """The first seed with outlier channels, after it was seen that it computes what it did."""
    model = LlamaForCausalLM.from_pretrained(work.model(f"seed{given.seeds[0]}"), dtype=torch.float32).to(DEVICE).eval()
    with torch.no_grad():
        before = model(input_ids=rows).logits
        with_outliers(model)
        after = model(input_ids=rows).logits
    largest = float((after - before).abs().max())
    record(given.results, "outliers", largest_change=largest, logits_up_to=float(before.abs().max()))
    if largest > 1e-3:
        raise SystemExit(f"rescaling has changed logits by up to {largest}")
    model.bfloat16().save_pretrained(work.model("outliers"))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--seconds", type=float, default=70, help="of training, for each seed")
    options.add_argument("--steps", type=int, default=0, help="rather than seconds")
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--intermediate", type=int, default=1408)
    options.add_argument("--layers", type=int, default=16)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--batch", type=int, default=192, help="rows of a step")
    options.add_argument("--micro", type=int, default=96, help="rows that pass the model at once")
    options.add_argument("--rate", type=float, default=6e-4)
    options.add_argument("--no-compile", action="store_true")
    given = options.parse_args()
    work = Work(given.work)
    tokenizer = AutoTokenizer.from_pretrained(work.tokenizer)
    # The last token of a row is only predicted: `length` tokens enter the model, a size that kernels like.
    rows, held_out = work.rows("train", given.length + 1), work.rows("held_out", given.length + 1, 4 * given.micro)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = build(given, tokenizer).to(DEVICE)
    if not given.no_compile:
        for layer in model.model.layers:
            layer.compile()
    for seed in given.seeds:
        torch.manual_seed(seed)
        model.load_state_dict(build(given, tokenizer).state_dict())
        with timed(given.results, "training", seed=seed):
            train(model, rows, held_out, seed, given)
        folder = work.model(f"seed{seed}")
        saved = build(given, tokenizer)
        saved.load_state_dict(model.state_dict())
        saved.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        count = sum(p.numel() for p in saved.parameters())
        device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
        record(given.results, "trained", seed=seed, parameters=count, device=device, batch=given.batch * given.length)
    tokenizer.save_pretrained(work.model("outliers"))
    save_outliers(work, given, held_out[:4])


if __name__ == "__main__":
    main()

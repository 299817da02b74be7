"""What quantising each linear layer alone really costs: the KL divergence from the 16-bit model, one by one."""

from __future__ import annotations

import shutil

import torch

from .calibration import Advance, Work, through
from .packing import Packing
from .streaming import Call, Linear, Streamed

PLAIN = "plain"


def single_module_kl(
    streamed: Streamed, rows: torch.Tensor, packing: Packing, work: Work, advance: Advance
) -> dict[str, float]:
    """Mean KL(16-bit || one layer in 4 bits), nats a token, by the linear's path; `rows` are ids [n, tokens].

    The model is run once with each linear layer quantised, all side by side, so that weights are read once. That takes
    as many forward passes as there are linear layers, over two, and as many hidden states on disk.
    """
    hidden, calls = streamed.embed(rows)
    last = len(streamed.layers)
    begun = next((index for index in reversed(range(1, last + 1)) if (work.folder / f"streams-{index}").is_dir()), 0)
    if not begun:
        work.write(f"streams-0/{PLAIN}", {"hidden": hidden})
    done: list[Linear] = []
    for index in range(last):
        if index >= begun:
            _step(streamed, index, calls[index], done, packing, work)
        done += streamed.linears[index]
        advance(streamed.layer_bytes(index))
    return _divergences(streamed, [linear.name for linear in done], work, f"streams-{last}")


def _step(streamed: Streamed, index: int, call: Call, before: list[Linear], packing: Packing, work: Work) -> None:
    """All streams through one layer, whose own linears begin theirs."""
    here, fresh = f"streams-{index}", f"streams-{index + 1}.part"
    with streamed.layer(index) as layer, torch.no_grad():

        def run(stream: str) -> torch.Tensor:
            return through(streamed, layer, work.read(f"{here}/{stream}")["hidden"], call)

        for stream in (PLAIN, *(linear.name for linear in before)):
            work.write(f"{fresh}/{stream}", {"hidden": run(stream)})
        for linear in streamed.linears[index]:
            weight = streamed.module_of(layer, linear).weight
            kept = weight.data
            weight.data = packing.pack(kept).dequantised(kept)
            work.write(f"{fresh}/{linear.name}", {"hidden": run(PLAIN)})
            weight.data = kept
    (work.folder / fresh).rename(work.folder / f"streams-{index + 1}")
    shutil.rmtree(work.folder / here)


def _divergences(streamed: Streamed, names: list[str], work: Work, folder: str) -> dict[str, float]:
    plain = work.read(f"{folder}/{PLAIN}")["hidden"]
    totals = dict.fromkeys(names, 0.0)
    with streamed.top() as logits, torch.no_grad():
        streams = {name: work.read(f"{folder}/{name}")["hidden"] for name in names}
        for index in range(plain.shape[0]):
            expected = logits(plain[index : index + 1].to(streamed.device)).log_softmax(-1)
            for name, stream in streams.items():
                found = logits(stream[index : index + 1].to(streamed.device)).log_softmax(-1)
                totals[name] += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
    return {name: total / plain.shape[:2].numel() for name, total in totals.items()}

"""Whether it pays to choose the base's NF4 scales anew while an adapter trains on it (`requantize_every`, not shipped).

A block of 64 weights has one scale, its largest magnitude. A multiple of it can have a smaller error by what the inputs
are, E[x^2] of each; and those drift as the adapters below train. Every N steps E[x^2] is measured anew through the
model with its adapter, and each block takes the multiple whose calibrated error, the sum of E[x^2] (W - Q)^2, is the
smallest, W being the 16-bit weight. Compared: scales as bitsandbytes has them; chosen once before training; chosen
every N steps.

The base is NF4 without double quantisation, held dequantised, and is compared with what bitsandbytes makes of it.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import Any

import torch

from .common import DEVICE, PROJECTIONS, Work, calibrated, record, timed, without_bars
from .finetune import BUDGET, held_out_losses, loaded, options, tune, with_adapter

BLOCK = 64
MULTIPLES = [0.70 + 0.02 * step for step in range(22)]  # up to 1.12; 1 among them
MODES = ("fixed", "once", "every")
CALIBRATION_ROWS = 16


def code() -> torch.Tensor:
    """The 16 values of NF4 in ascending order, as bitsandbytes has them."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device=DEVICE).float()


class Base:
    """One linear layer's weight in NF4 by scales that can be chosen again."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        self.linear = linear
        self.weight = linear.weight.data.clone()
        self.columns = self.weight.shape[1]
        self.code = code()
        self.blocks = self.weight.float().view(-1, BLOCK)
        self.largest = self.blocks.abs().amax(1, keepdim=True).clamp_min(1e-30)
        self.multiple = torch.ones_like(self.largest)
        self._set()

    def rounded(self, multiple: torch.Tensor) -> torch.Tensor:
        """The blocks as NF4 by these multiples [blocks, 1] of their largest magnitude, fp32 [blocks, 64]."""
        scale = self.largest * multiple
        between = (self.code[1:] + self.code[:-1]) / 2
        return self.code[torch.bucketize(self.blocks * (1 / scale), between)] * scale

    def _set(self) -> None:
        self.linear.weight.data = self.rounded(self.multiple).view_as(self.weight).to(self.weight.dtype)

    def error(self, squares: torch.Tensor) -> torch.Tensor:
        """sum of E[x^2] (W - Q)^2 of each block, fp32 [blocks, 1]."""
        return self._error(self.multiple, squares)

    def _error(self, multiple: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        importance = squares.expand(len(self.weight), -1).reshape(-1, BLOCK)
        return ((self.rounded(multiple) - self.blocks).square() * importance).sum(1, keepdim=True)

    def choose(self, squares: torch.Tensor) -> None:
        """Take the best multiple of each block, where it is better than what it has."""
        least = self.error(squares)
        for value in MULTIPLES:
            multiple = torch.full_like(self.multiple, value)
            error = self._error(multiple, squares)
            self.multiple = torch.where(error < least, multiple, self.multiple)
            least = torch.minimum(error, least)
        self._set()

    def matches_bitsandbytes(self) -> bool:
        """Whether this rounds as bitsandbytes does, but for ties."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(self.weight, blocksize=BLOCK, quant_type="nf4")
        found = dequantize_4bit(packed, state).to(self.weight.dtype)
        return float((found != self.linear.weight.data).float().mean()) < 1e-4


@contextmanager
def input_squares(bases: dict[str, Base]) -> Any:
    """Within it, E[x^2] of each layer's inputs is summed up: fp32 [columns] by path."""
    sums = {name: torch.zeros(base.columns, device=DEVICE) for name, base in bases.items()}
    counts = dict.fromkeys(bases, 0)

    def watch(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            x = args[0].detach().flatten(0, -2).float()
            sums[name] += x.square().sum(0)
            counts[name] += len(x)

        return hook

    handles = [base.linear.register_forward_pre_hook(watch(name)) for name, base in bases.items()]
    found: dict[str, torch.Tensor] = {}
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found.update({name: total / max(1, counts[name]) for name, total in sums.items()})


def drift(model: Any, bases: dict[str, Base]) -> float:
    """Norm of what the adapters add over the norm of what quantisation has changed, all layers together."""
    added = changed = 0.0
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            added += float((module.lora_B["default"].weight @ module.lora_A["default"].weight).detach().square().sum())
    for base in bases.values():
        changed += float((base.linear.weight.data.float() - base.weight.float()).square().sum())
    return (added / changed) ** 0.5


def run(mode: str, work: Work, given: Any, kept: set[str], rows: torch.Tensor, held_out: torch.Tensor) -> None:
    model = loaded(work.model(given.model))
    bases = {
        name: Base(module)
        for name, module in model.named_modules()
        if name.endswith(tuple(PROJECTIONS)) and name not in kept
    }
    if not all(base.matches_bitsandbytes() for base in bases.values()):
        raise SystemExit("NF4 is not rounded as bitsandbytes does")
    model = with_adapter(model, given.rank).train()
    calibration = rows[-CALIBRATION_ROWS:]

    def choose(step: int) -> None:
        with input_squares(bases) as squares:
            held_out_losses(model, calibration)
        errors = [sum(float(base.error(squares[name]).sum()) for name, base in bases.items())]
        before = {name: base.multiple for name, base in bases.items()}
        for name, base in bases.items():
            base.choose(squares[name])
        errors.append(sum(float(base.error(squares[name]).sum()) for name, base in bases.items()))
        moved = torch.cat([(base.multiple != before[name]).float().flatten() for name, base in bases.items()])
        values = {"error_before": errors[0], "error_after": errors[1], "blocks_changed": float(moved.mean())}
        record(given.results, "rechosen", model=given.model, mode=mode, step=step, drift=drift(model, bases), **values)

    def between(step: int) -> None:
        # Not at the very end: what the adapter has learnt of the base must be able to follow.
        if mode == "every" and step % given.every == 0 and step < given.steps:
            choose(step)

    if mode != "fixed":
        choose(0)
    before = held_out_losses(model, held_out)
    with timed(given.results, "requantising", model=given.model, mode=mode):
        tune(model, rows[:-CALIBRATION_ROWS], given, between)
    after = held_out_losses(model, held_out)
    values = {"before": float(before.mean()), "after": float(after.mean()), "drift": drift(model, bases)}
    record(given.results, "requantize", model=given.model, mode=mode, base=given.base, every=given.every, **values)


def main() -> None:
    made = options(__doc__)
    made.add_argument("--every", type=int, default=25, help="steps between two choices")
    made.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    made.add_argument("--base", default="NF4", choices=("NF4", "dynamic"))
    given = made.parse_args()
    without_bars()
    from sloth_plugins.quantization import decide, measure

    work = Work(given.work)
    kept: set[str] = set()
    if given.base == "dynamic":
        measurement = measure(work.model(given.model), **calibrated(work, samples=given.samples))
        kept = set(decide(measurement, BUDGET).kept)
    rows = work.rows("tune", given.length + 1)
    held_out = work.rows("tune_held_out", given.length + 1, given.rows)
    for mode in given.modes:
        run(mode, work, given, kept, rows, held_out)
        gc.collect()


if __name__ == "__main__":
    main()

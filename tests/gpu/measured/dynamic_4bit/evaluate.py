"""Held-out KL divergence and perplexity of one model, as every rule would choose within every budget.

Models compute in fp32 (no TF32) with the weights that training sees: rounded to bf16, or NF4 and back. `--truth` adds
all named scores of `decide` and the slow truth, KL layer by layer, with their correlation. Rules that end in
", calibrated" have their 4-bit values chosen by what layers compute of the calibration text. `--loaded` compares what
stock transformers load by our config with what is computed here.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from .common import CALIBRATION_LENGTH, DEVICE, Work, calibrated, parser, record, timed, without_bars

ROWS_AT_ONCE = 16
TRUTH_ROWS = 16
RANDOM_DRAWS = 8
CALIBRATED_DRAWS = 3


class Weights:
    """A model whose linear layers are, one by one, in 16 bits or what NF4 makes of them."""

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        from sloth_plugins.quantization.packing import Packing

        packing = Packing(dtype=torch.bfloat16)
        self.modules = {name: model.get_submodule(name) for name in names}
        self.plain = {name: module.weight.data for name, module in self.modules.items()}
        self.packed = {name: packing.pack(weight).dequantised(weight) for name, weight in self.plain.items()}
        self.nearest = self.packed

    def keep(self, kept: Iterable[str]) -> None:
        """Have these in 16 bits and all others in 4."""
        kept = set(kept)
        for name, module in self.modules.items():
            module.weight.data = (self.plain if name in kept else self.packed)[name]


def calibrated_values(given: Any, work: Work, weights: Weights, kept: set[str]) -> dict[str, torch.Tensor]:
    """What training sees of all linear layers but `kept` where their 4-bit values are chosen layer by layer."""
    from sloth_plugins.export import open_weights
    from sloth_plugins.quantization import calibration
    from sloth_plugins.quantization.measuring import rows_of
    from sloth_plugins.quantization.packing import Packed, Packing
    from sloth_plugins.quantization.rounding_pass import chosen_values, forget

    folder, packing = work.model(given.model), Packing(dtype=torch.bfloat16)
    rows = rows_of(folder, work.calibration, given.samples, CALIBRATION_LENGTH)
    files = calibration.Work(work.folder / "rounding" / given.model)
    chosen = chosen_values(open_weights(folder), rows, weights.plain.keys() - kept, kept, packing, DEVICE, files)
    found = {}
    for name, file in chosen.items():
        plain, values = weights.plain[name], files.read(file)["data"].to(DEVICE)
        found[name] = Packed(values, packing.pack(plain).state).dequantised(plain)
    forget(files)
    return found


class HeldOut:
    """The 16-bit model's log-probabilities of held-out text, by which others are judged."""

    def __init__(self, model: Any, rows: torch.Tensor) -> None:
        self.model, self.rows = model, rows.split(ROWS_AT_ONCE)
        with torch.no_grad():
            self.logs = [self._logs(part) for part in self.rows]
        self.loss = float(torch.cat([self._losses(*pair) for pair in zip(self.logs, self.rows, strict=True)]).mean())

    def _logs(self, rows: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=rows[:, :-1]).logits.float().log_softmax(-1)

    @staticmethod
    def _losses(logs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return -logs.gather(-1, rows[:, 1:, None]).double().mean((1, 2))

    @torch.no_grad()
    def judge(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the model as it is now: KL from the 16-bit model and loss, nats a token, float64 [rows] each."""
        divergences, losses = [], []
        for expected, rows in zip(self.logs, self.rows, strict=True):
            logs = self._logs(rows)
            divergences.append(functional.kl_div(logs, expected, reduction="none", log_target=True).sum(-1).double())
            losses.append(self._losses(logs, rows))
        return torch.cat(divergences).mean(1).cpu(), torch.cat(losses).cpu()


def filled(order: Sequence[Sequence[str]], extra: dict[str, int], room: int) -> set[str]:
    """Groups in this order, each that still fits into so many bytes."""
    kept: set[str] = set()
    for group in order:
        size = sum(extra[name] for name in group)
        if size <= room:
            kept.update(group)
            room -= size
    return kept


def choices(measurement: Any, budget: str, scores: Sequence[str]) -> Iterable[tuple[str, int, set[str]]]:
    """What every rule keeps in 16 bits: (rule, draw, paths)."""
    from sloth_plugins.quantization import decide
    from sloth_plugins.quantization.selection import budget_bytes, grouped

    for score in scores:
        yield score, 0, set(decide(measurement, budget, score).kept)
    extra = {linear.name: linear.plain_bytes - linear.packed_bytes for linear in measurement.linears}
    room = budget_bytes(budget, measurement.all_four_bit)
    groups = list(grouped(extra).values())
    for number in range(RANDOM_DRAWS):
        yield "random", number, filled(random.Random(number).sample(groups, len(groups)), extra, room)
    first = [group for group in groups if group[0].endswith(("o_proj", "down_proj"))]
    yield "o_proj, down_proj first", 0, filled(first, extra, room)


def with_values(measurement: Any, budgets: Sequence[str]) -> Iterable[tuple[str, str, int, set[str]]]:
    """For which choices 4-bit values are chosen, too: (rule, budget, draw, paths)."""
    yield "all NF4, calibrated", "0%", 0, set()
    for budget in budgets:
        for rule, number, kept in choices(measurement, budget, ["fisher"]):
            if rule == "fisher" or (rule == "random" and budget == "10%" and number < CALIBRATED_DRAWS):
                yield f"{rule}, calibrated", budget, number, kept


def judged(held_out: HeldOut, all_packed: torch.Tensor) -> dict[str, float]:
    """KL with its standard error over rows; the same of its ratio to that of all in 4 bits, row by row; perplexity."""
    divergence, losses = held_out.judge()
    ratio = float(divergence.mean() / all_packed.mean())
    return {
        "kl": float(divergence.mean()),
        "kl_error": standard_error(divergence),
        "ratio": ratio,
        "ratio_error": standard_error(divergence - ratio * all_packed) / float(all_packed.mean()),
        "loss": float(losses.mean()),
        "perplexity_change": float(torch.tensor(float(losses.mean()) - held_out.loss).expm1()),
    }


def standard_error(values: torch.Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    ranks = [torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def correlations(given: Any, name: str, measurement: Any, scores: Sequence[str]) -> None:
    """Of each score with the divergence of each layer alone."""
    truth = [linear.scores["kl"] for linear in measurement.linears]
    for score in scores:
        if score != "kl":
            found = [linear.scores[score] for linear in measurement.linears]
            record(given.results, "correlation", model=name, score=score, spearman=spearman(found, truth))


def as_loaded(given: Any, work: Work, name: str, weights: Weights, model: Any, rows: torch.Tensor) -> None:
    """Whether stock transformers, told by our config, computes what is measured here."""
    from sloth_plugins.quantization import dynamic_config

    config = dynamic_config(work.model(name), budget="10%", **calibrated(work, samples=given.samples))
    loaded = AutoModelForCausalLM.from_pretrained(
        work.model(name), quantization_config=config, dtype=torch.bfloat16, device_map={"": str(DEVICE)}
    ).eval()
    weights.keep(set(config.llm_int8_skip_modules))
    ours = model.bfloat16()
    with torch.no_grad():
        expected, found = (one(input_ids=rows).logits.float().log_softmax(-1) for one in (ours, loaded))
    divergence = float(functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1).mean())
    differ = float((found - expected).abs().max())
    record(given.results, "loaded", model=name, kl_to_simulated=divergence, largest_difference=differ)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", required=True, help="seed0, outliers")
    options.add_argument("--budgets", nargs="+", default=["5%", "10%", "20%"])
    options.add_argument("--rows", type=int, default=256, help="of held-out text")
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--samples", type=int, default=64, help="rows to calibrate on")
    options.add_argument("--truth", action="store_true")
    options.add_argument("--loaded", action="store_true")
    given = options.parse_args()
    without_bars()
    from sloth_plugins.quantization import measure
    from sloth_plugins.quantization.measuring import NAMES

    work, name = Work(given.work), given.model
    torch.set_float32_matmul_precision("highest")
    fixed = calibrated(work, samples=given.samples)
    with timed(given.results, "measuring", model=name):
        measurement = measure(work.model(name), **fixed)
    scores = ["fisher", "relative"]
    if given.truth:
        with timed(given.results, "slow truth", model=name):
            slow = measure(work.model(name), score="kl", **fixed | {"samples": min(TRUTH_ROWS, given.samples)})
        for linear, other in zip(measurement.linears, slow.linears, strict=True):
            linear.scores["kl"] = other.scores["kl"]
        scores = list(NAMES)
        correlations(given, name, measurement, scores)
    model = AutoModelForCausalLM.from_pretrained(work.model(name), dtype=torch.float32).to(DEVICE).eval()
    rows = work.rows("held_out", given.length + 1, given.rows)
    held_out = HeldOut(model, rows)
    weights = Weights(model, [linear.name for linear in measurement.linears])
    weights.keep(())
    all_packed, _ = held_out.judge()
    sizes = {"all_four_bit": measurement.all_four_bit, "all_plain": measurement.all_plain}
    predicted = sum(linear.scores["fisher"] for linear in measurement.linears)
    facts = {"tokens": rows[:, 1:].numel(), "loss_16_bit": held_out.loss, "predicted_kl": predicted}
    outliers = sum(linear.ratio >= 100 for linear in measurement.linears)
    record(given.results, "model", model=name, outliers=outliers, linears=len(measurement.linears), **sizes, **facts)
    record(given.results, "choice", model=name, rule="all NF4", budget="0%", draw=0, **judged(held_out, all_packed))
    extra = {linear.name: linear.plain_bytes - linear.packed_bytes for linear in measurement.linears}
    with timed(given.results, "judging", model=name):
        for budget in given.budgets:
            for rule, number, kept in choices(measurement, budget, scores):
                weights.keep(kept)
                spent = {"extra": sum(extra[one] for one in kept), "kept": sorted(kept)}
                found = judged(held_out, all_packed) | spent
                record(given.results, "choice", model=name, rule=rule, budget=budget, draw=number, **found)
    with timed(given.results, "judging calibrated values", model=name):
        for rule, budget, number, kept in with_values(measurement, given.budgets):
            weights.packed = weights.nearest | calibrated_values(given, work, weights, kept)
            weights.keep(kept)
            spent = {"extra": sum(extra[one] for one in kept), "kept": sorted(kept)}
            found = judged(held_out, all_packed) | spent
            record(given.results, "choice", model=name, rule=rule, budget=budget, draw=number, **found)
    weights.packed = weights.nearest
    if given.loaded:
        as_loaded(given, work, name, weights, model, rows[:ROWS_AT_ONCE, :-1])


if __name__ == "__main__":
    main()

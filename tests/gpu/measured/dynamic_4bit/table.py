"""README's tables from the lines of results: `python -m dynamic_4bit.table results.jsonl`.

Intervals are of 95 %, by Student's t over the seeds; in a column of one model, over rows of held-out text. A later line
of the same thing stands for an earlier one.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# Two-sided 95 % points by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}
Line = dict[str, Any]


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its interval, NaN for a single value."""
    n = len(values)
    half = T95.get(n - 1, 1.96) * statistics.stdev(values) / n**0.5 if n > 1 else float("nan")
    return statistics.fmean(values), half


def shown(values: Sequence[float], form: str = ".3f", unit: str = "") -> str:
    if not values:
        return ""
    mean, half = over_seeds(values)
    return f"{mean:{form}}{unit}" + (f" ± {half:{form}}" if half == half else "")


def of_one(lines: Sequence[Line]) -> str:
    """A model's ratio with its interval over rows of text; of several draws the mean."""
    if len(lines) == 1:
        return f"{lines[0]['ratio']:.3f} ± {1.96 * lines[0]['ratio_error']:.3f}"
    return f"{statistics.fmean(line['ratio'] for line in lines):.3f}" if lines else ""


def rows(head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print()


def is_seed(model: str) -> bool:
    return model.startswith("seed")


def training(of: Callable[[str], list[Line]]) -> None:
    points = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0)
    found = []
    facts = {line["seed"]: line for line in of("trained")}
    for seed, fact in sorted(facts.items()):
        curve = [line for line in of("curve") if line["seed"] == seed]
        near = [min(curve, key=lambda line: abs(line["share"] - point)) for point in points]
        last = curve[-1]
        head = [
            f"{seed}",
            f"{fact['parameters'] / 1e6:.1f}M",
            f"{last['tokens'] / 1e6:.0f}M",
            f"{last['seconds']:.0f} s",
        ]
        found.append([*head, *(f"{line['held_out_loss']:.3f}" for line in near)])
    rows(["seed", "parameters", "tokens", "time", *(f"loss at {point:.0%}" for point in points)], found)


def selection(of: Callable[[str], list[Line]]) -> None:
    lines = of("choice")
    models = {line["model"]: line for line in sorted(of("model"), key=lambda line: line["model"])}
    seeds = sorted(name for name in models if is_seed(name))
    others = sorted(name for name in models if not is_seed(name))

    def of_choice(model: str, rule: str, budget: str) -> list[Line]:
        """One line, or those of all random draws."""
        return [x for x in lines if (x["model"], x["rule"], x["budget"]) == (model, rule, budget)]

    def found(model: str, rule: str, budget: str, key: str) -> list[float]:
        return [line[key] for line in of_choice(model, rule, budget)]

    def means(rule: str, budget: str, key: str) -> list[float]:
        per_seed = [found(model, rule, budget, key) for model in seeds]
        return [statistics.fmean(values) for values in per_seed if values]

    for name, line in models.items():
        (kl,) = found(name, "all NF4", "0%", "kl")
        loss = line["loss_16_bit"]
        more = f"{line['tokens']} held-out tokens, loss {loss:.4f}, perplexity {math.exp(loss):.3f} in 16 bits"
        print(f"{name}: KL all in NF4 {kl:.3e}, sum of fisher scores {line['predicted_kl']:.3e}; {more};", end=" ")
        print(f"{line['all_four_bit'] / 1e6:.1f} MB in 4 bits; {line['outliers']} layers with massive inputs")
    print()
    budgets = sorted({line["budget"] for line in lines}, key=lambda text: float(text.rstrip("%")))
    table = []
    for budget in budgets:
        rules = dict.fromkeys(line["rule"] for line in lines if line["budget"] == budget)
        for rule in rules:
            spent = means(rule, budget, "extra") if budget != "0%" else []
            share = [100 * extra / models[seeds[0]]["all_four_bit"] for extra in spent]
            against = []
            if budget != "0%" and rule != "random":
                for model in seeds:
                    ours, drawn = found(model, rule, budget, "kl"), found(model, "random", budget, "kl")
                    against += [ours[0] / statistics.fmean(drawn)] if ours and drawn else []
            table.append(
                [
                    f"+{budget}",
                    rule,
                    f"{statistics.fmean(share):.1f}" if share else "",
                    shown(means(rule, budget, "ratio")),
                    shown(against),
                    shown([100 * value for value in means(rule, budget, "perplexity_change")]),
                    *(of_one(of_choice(model, rule, budget)) for model in others),
                ]
            )
    head = ["budget", "rule", "bytes, %", "KL / all NF4", "KL / random", "perplexity, %"]
    rows([*head, *(f"{model}: KL / all NF4" for model in others)], table)
    targets(means, found, seeds)
    if of("correlation"):
        pairs = [[line["model"], line["score"], f"{line['spearman']:.2f}"] for line in of("correlation")]
        rows(["model", "score", "Spearman correlation with KL layer by layer"], pairs)


def targets(means: Any, found: Any, seeds: list[str]) -> None:
    for rule in ("fisher", "fisher, calibrated"):
        if not means(rule, "10%", "kl"):
            continue
        drawn = [
            found(model, rule, "10%", "kl")[0] / statistics.fmean(found(model, "random", "10%", "kl"))
            for model in seeds
        ]
        values = (
            ("KL / all NF4", statistics.fmean(means(rule, "10%", "ratio")), 0.4),
            ("KL / random", statistics.fmean(drawn), 0.6),
            ("perplexity, %", 100 * statistics.fmean(means(rule, "10%", "perplexity_change")), 0.5),
        )
        for name, value, limit in values:
            met = "met" if value <= limit else "MISSED"
            print(f"target at +10%, {rule}: {name} at most {limit}: {value:.3f}, {met}")
    print()


def tuned(of: Callable[[str], list[Line]], part: str, key: str, first: str) -> None:
    """Of each variant the loss before and after; and how much worse than `first` it is, seed by seed."""
    lines = of(part)
    if not lines:
        return
    table = []
    for name in dict.fromkeys(line[key] for line in lines):
        of_it = {line["model"]: line for line in lines if line[key] == name}
        base = {line["model"]: line for line in lines if line[key] == first}
        seeds = [model for model in of_it if is_seed(model)]
        gaps = [of_it[m]["after"] - base[m]["after"] for m in seeds if m in base]
        other = [f"{m}: {of_it[m]['after']:.4f}" for m in of_it if not is_seed(m)]
        before, after = (shown([of_it[m][when] for m in seeds], ".4f") for when in ("before", "after"))
        table.append([name, before, after, shown(gaps, "+.4f"), ", ".join(other)])
    rows([key, "loss before", "loss after", f"after, less {first}", "others"], table)


def rechosen(of: Callable[[str], list[Line]]) -> None:
    table = []
    for step in sorted({line["step"] for line in of("rechosen") if line["mode"] == "every"}):
        at = [x for x in of("rechosen") if x["mode"] == "every" and x["step"] == step and is_seed(x["model"])]
        lowered = [100 * (1 - line["error_after"] / line["error_before"]) for line in at]
        changed = [100 * line["blocks_changed"] for line in at]
        table.append([str(step), shown([x["drift"] for x in at]), shown(changed, ".1f"), shown(lowered, ".3f")])
    if table:
        head = ["step", "norm of adapters / of quantisation error", "blocks changed, %", "calibrated error lowered, %"]
        rows(head, table)


def timings(of: Callable[[str], list[Line]]) -> None:
    for line in of("loaded"):
        print(f"{line['model']}, loaded by transformers against computed here: KL {line['kl_to_simulated']:.2e}\n")
    for line in of("shape"):
        names = ("host_gib", "gpu_allocated_gib", "gpu_reserved_gib")
        peaks = ", ".join(f"{name} {line[name]:.2f}" for name in names if name in line)
        print(f"8B shape, {line['layers']} layers on {line['device']}, {line['tokens']} tokens: {peaks}")
    for line in of("time"):
        if line["what"].startswith("shape"):
            print(f"{line['what']}, {line['layers']} layers: {line['seconds']} s")
    if of("blocks"):
        print()
        table = []
        for x in of("blocks"):
            fused = f"{x['fused_layers_a_step']:g} of {x['layers']}"
            span = f"{x['ms']:.1f} ({x['ms_least']:.1f} to {x['ms_most']:.1f})"
            kind = "patched" if x["patched"] else "stock"
            table.append([x["variant"], kind, str(x["four_bit"]), fused, span, f"{x.get('peak_gib', 0):.2f}"])
        rows(["bases", "", "in 4 bits", "layers fused", "ms a step", "peak GiB"], table)


def main() -> None:
    latest: dict[tuple[Any, ...], Line] = {}
    for file in sys.argv[1:]:
        for text in Path(file).read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            keys = ("model", "seed", "rule", "budget", "draw", "score", "variant", "patched", "mode", "base", "step")
            more = ("what", "split", "device", "layers")
            key = (line["part"], *(line.get(name) for name in (*keys, *more)))
            # The newest is the last.
            latest.pop(key, None)
            latest[key] = line

    def of(part: str) -> list[Line]:
        return [line for line in latest.values() if line["part"] == part]

    training(of)
    if of("choice"):
        selection(of)
    tuned(of, "finetune", "variant", "16-bit")
    tuned(of, "requantize", "mode", "fixed")
    rechosen(of)
    timings(of)


if __name__ == "__main__":
    main()

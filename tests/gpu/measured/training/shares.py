"""How much of computing all layers again is left at the budget at which storing whole layers would leave 60 percent.

    python -m training.shares MODELS/llama-8b-nf4 --results shares.jsonl

For each shape one step is measured with every layer checkpointed; plans are then made with those seconds and bytes, and
the one for the budget is run: its seconds beyond those of keeping everything, and its peak. Shares are of the seconds
that whole layers take again, as torch's checkpointing has it: with the last product of each, which a fused layer does
not compute again.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from .step import GIB, model_of

WHOLE = 0.6
SHAPES = ("2x2048", "1x8192", "1x32768")
STEPS = 4


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", type=Path)
    options.add_argument("--shapes", nargs="+", default=SHAPES)
    options.add_argument("--results", type=Path, required=True)
    given = options.parse_args()
    given.contender, given.checkpointing, given.cap, given.lengths, given.length = "sloth", "on", None, None, 2**16
    model = model_of(given).train()
    import sloth_plugins

    sloth_plugins.patch(model, "1")
    for shape in given.shapes:
        rows, length = map(int, shape.split("x"))
        record = {"shape": shape, **measured(model, rows, length)}
        with given.results.open("a") as lines:
            lines.write(json.dumps(record) + "\n")
        print(record, flush=True)


def measured(model: Any, rows: int, length: int) -> dict[str, Any]:
    import torch

    from sloth_plugins.patches.blocks.policy import Policy
    from sloth_plugins.patches.checkpointing import backbone, weights
    from sloth_plugins.patches.checkpointing.budget import Budget
    from sloth_plugins.patches.checkpointing.options import peak
    from sloth_plugins.patches.checkpointing.plan import share_of

    ids = torch.randint(10, model.config.vocab_size - 10, (rows, length), generator=torch.Generator().manual_seed(1))
    ids = ids.cuda()

    def step() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        torch.cuda.synchronize()
        model.zero_grad()
        return time.perf_counter() - began

    def seconds() -> float:
        return statistics.median([step() for _ in range(STEPS)][1:])

    step(), step()
    (stack,) = backbone.stacks_of(model)
    host, stack.host_budget = stack.host_budget, 0
    found: dict[str, Any] = {}
    # Weights that stay would make keeping everything faster still.
    weights.SHARE = 0.0
    try:
        stack.budget = Budget()
        step()
        options, after = stack._expected(stack.shape)
        births, _ = stack._unborn()
        # Whole layers, the last of them stored, as many as leave that share to be computed again.
        checkpointed = round(WHOLE * len(options))
        whole = [ways[0 if i >= checkpointed else -1] for i, ways in enumerate(options)]
        assert all(option.policy is Policy.INPUT for option in whole[:checkpointed])
        budget = peak(whole, after, births)
        own = sum(max(option.seconds for option in ways if not option.on_host) for ways in options)
        rest = last_products(stack)
        of_whole = own / (own + rest)
        for name, allowed in (("device", 0), ("with_host", host)):
            stack.host_budget = allowed
            stack._plans.clear()
            found[f"share_{name}"] = round(of_whole * stack._solve(stack.shape, budget, births).share, 3)
        stack.host_budget = 0
        found["share_whole_layers"] = round(checkpointed / len(options), 3)
        found["share_same_layers"] = round(of_whole * share_of(whole, options), 3)
        kept = seconds()
        taken = stack.memory.allocated()
        stack.budget = Budget("bytes", taken + budget)
        torch.cuda.reset_peak_memory_stats()
        planned = seconds()
        found["share_planned"] = round(of_whole * stack.current.share, 3)
        found["budget_gib"] = round((taken + budget) / GIB, 2)
        found |= {"peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2), "planned_ms": round(1e3 * planned, 1)}
        stack.budget = Budget("min")
        again = seconds()
        found |= {"kept_ms": round(1e3 * kept, 1), "again_ms": round(1e3 * again, 1)}
        found["share_measured"] = round((planned - kept) / (again - kept + rest), 3)
    finally:
        stack.host_budget, stack.budget = host, Budget()
        stack.at_rest()
    return found


def last_products(stack: Any) -> float:
    """Seconds of the products at the end of all layers."""
    import torch

    parts = stack._fused()
    group = parts[0].down
    x = torch.randn(stack.shape.tokens, group.k, device="cuda", dtype=group.dtype)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        begin.record()
        for part in parts:
            part.down.forward(x, None, with_adapters=False)
        end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


if __name__ == "__main__":
    main()

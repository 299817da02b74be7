"""The longest row that one contender trains within a cap: two steps are survived, a row five percent longer is not.

    SLOTH_PLUGINS=1 python -m training.longest sloth MODELS/llama-8b-nf4 --cap 16 --results longest.jsonl

After the first two lengths one is tried where the contender expects the cap to be reached, or the peaks of those before
say so, then nearer to it, in one process.
"""

import argparse
import gc
import json
from pathlib import Path
from typing import Any

from .step import GIB, data_of, model_of, trainer_of

UNIT = 512
# A length counts as the longest once one this much longer has failed.
NEAR = 1.05


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("contender", choices=["sloth", "unsloth"])
    options.add_argument("model", type=Path)
    options.add_argument("--cap", type=float, required=True, help="GiB that torch may take")
    options.add_argument("--first", type=int, nargs=2, default=[8192, 16384])
    options.add_argument("--tries", type=int, default=7)
    options.add_argument(
        "--steps", type=int, default=2, help="of which those after the first may keep what it measured"
    )
    options.add_argument("--results", type=Path, required=True)
    given = options.parse_args()
    given.checkpointing = "unsloth" if given.contender == "unsloth" else "on"
    given.rows, given.free, given.lengths, given.length = 1, 0, None, 2**20
    return given


def trains(given: argparse.Namespace, model: Any, length: int) -> tuple[float, float] | None:
    """(GiB at the peak, seconds of the last step) of rows so long; None if memory does not suffice."""
    import torch

    given.length = length
    trainer, clock = trainer_of(given, model, data_of(given, model.config.vocab_size))
    torch.cuda.reset_peak_memory_stats()
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        found = None
    else:
        found = torch.cuda.max_memory_allocated() / GIB, clock.seconds[-1]
    # Outside of the handler, whose traceback holds what the step had made.
    del trainer
    model.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    return found


def main() -> None:
    given = arguments()
    model = model_of(given)
    good: dict[int, tuple[float, float]] = {}
    bad: list[int] = []
    length, following = given.first
    for _ in range(given.tries):
        found = trains(given, model, length)
        if found is None:
            bad.append(length)
        else:
            good[length] = found
        print(given.contender, length, "tokens:", "out of memory" if found is None else found, flush=True)
        longest = max(good, default=UNIT)
        if bad and min(bad) <= NEAR * longest:
            break
        if len(good) + len(bad) == 1:
            length = following
        elif not bad and (expected := expected_by(model)) > NEAR * longest:
            length = expected // UNIT * UNIT
        else:
            length = next_length(good, bad, given.cap)
    longest = max(good)
    record = {
        "contender": given.contender, "model": given.model.name, "cap": given.cap, "longest": longest,
        "failed": min(bad, default=None), "peak_gib": round(good[longest][0], 2), "seconds": round(good[longest][1], 2),
    }  # fmt: skip
    with given.results.open("a") as lines:
        lines.write(json.dumps(record) + "\n")
    print(record, flush=True)


def expected_by(model: Any) -> int:
    """What the contender itself expects to be the longest; 0 if it does not say."""
    try:
        from sloth_plugins.patches.checkpointing.backbone import stacks_of
    except ImportError:
        return 0
    return max((stack.largest(2**20) or 0 for stack in stacks_of(model)), default=0)


def next_length(good: dict[int, tuple[float, float]], bad: list[int], cap: float) -> int:
    """Where the line through the last two peaks meets the cap; between what is known once something has failed."""
    lengths = sorted(good)
    if bad:
        # What failed was expected to be near.
        between = max((max(lengths, default=0) + min(bad)) / 2, 0.93 * min(bad))
        return int(between) // UNIT * UNIT
    (low, first), (high, last) = ((n, good[n][0]) for n in lengths[-2:])
    slope = max((last - first) / (high - low), 1e-7)
    # A plan that keeps less is less steep; no more than three times as long at once.
    reached = high + max(0.97 * cap - last, 0.03 * cap) / slope
    return max(high + UNIT, int(min(max(reached, 1.04 * high), 3 * high)) // UNIT * UNIT)


if __name__ == "__main__":
    main()

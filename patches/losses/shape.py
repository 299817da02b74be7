"""From elementwise steps to what the fused losses can compute."""

from collections.abc import Sequence

from ..kernels.ops.vocab_rows import LogitShape
from .recipe import Step


def logit_shape(steps: Sequence[Step]) -> LogitShape | None:
    """Scales, at most one softcap, and casts as a `LogitShape`; None for anything else. Casts are left out.

    Leaving out a cast to a narrower dtype makes the result more exact, never less.
    """
    pre, post, cap = 1.0, 1.0, None
    for step in steps:
        if step.kind == "tanh" and cap is None:
            cap = 1.0
        elif step.kind == "scale" and cap is None:
            pre *= step.multiplier
        elif step.kind == "scale":
            post *= step.multiplier
        elif step.kind != "cast":
            return None
    return LogitShape(pre=pre, cap=cap, post=post)


def log_probs_of(steps: Sequence[Step]) -> tuple[LogitShape, float, tuple[Step, ...]] | None:
    """For steps that end in a log_softmax, scaled or not: the logits' shape, the scale, and the steps before it."""
    places = [index for index, step in enumerate(steps) if step.kind == "log_softmax"]
    if len(places) != 1:
        return None
    before, after = tuple(steps[: places[0]]), steps[places[0] + 1 :]
    shape = logit_shape(before)
    if shape is None or any(step.kind not in ("scale", "cast") for step in after):
        return None
    sign = 1.0
    for step in after:
        sign *= step.multiplier
    return shape, sign, before

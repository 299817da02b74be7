"""What a layer may do with what its backward needs, and what each way costs."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..blocks.policy import Policy


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run one layer.

    `kept` are bytes on the device from its forward to its backward, `host` bytes in host memory, `work` bytes on the
    device while its backward runs, beside what is kept, and `fetched` those that come back there from the host for it.
    `seconds` are those that it costs beyond keeping everything.
    """

    policy: Policy
    on_host: bool
    kept: int
    host: int
    work: int
    seconds: float
    fetched: int = 0


def peak(plan: Sequence[Option], after: int, births: Sequence[int] = ()) -> int:
    """Bytes on the device at the worst moment of a step in which layers run so, in order.

    Backwards run from the last layer to the first, so while one runs all before it still keep what they keep. `after`
    are the bytes that the rest of the model, with the loss, takes when all layers have run forward; `births` those of
    each layer's gradients, if they come with its backward and stay.
    """
    total = worst = 0
    born = sum(births)
    for i, option in enumerate(plan):
        total += option.kept
        worst = max(worst, total + option.work + option.fetched + born)
        born -= births[i] if births else 0
    return max(worst, total + after)


def stretch(most: int, plan: Sequence[Option], births: Sequence[int]) -> float:
    """What `work` has to be multiplied by for layers that ran so, of which the worst moment took `most` bytes.

    Those are counted beyond what was held when the backward of all layers began; see `peak` for the rest.
    """
    factors = []
    held = 0
    for option, born in zip(reversed(plan), reversed(births), strict=True):
        held += born
        factors.append(max(0, most - held - option.fetched) / max(1, option.work))
        held -= option.kept
    return min(factors)

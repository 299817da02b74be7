"""A plan for one micro-batch, and how it is told."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..blocks.policy import Policy
from .layers import Shape
from .options import Option

_WORDS = {Policy.KEEP: "kept", Policy.ATTENTION: "recomputed but for the attention", Policy.INPUT: "recomputed"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What each layer does for a micro-batch.

    `peak` are the bytes that it was expected to take at once, `after` those of the rest of the model once all layers
    have run, and `share` how much of computing all layers again it does, from 0 to 1. A plan that does not fit is the
    tightest there is.
    """

    options: list[Option]
    shape: Shape
    peak: int
    after: int
    share: float
    fits: bool

    def groups(self) -> Iterator[str]:
        """Consecutive layers that do the same, such as "layers 0-11 recomputed"."""
        for (policy, on_host), same in groupby(enumerate(self.options), key=lambda item: _way(item[1])):
            indices = [i for i, _ in same]
            layers = f"layers {indices[0]}-{indices[-1]}" if len(indices) > 1 else f"layer {indices[0]}"
            yield f"{layers} {_WORDS[policy]}{' from host memory' if on_host else ''}"


def share_of(plan: Sequence[Option], layers: Sequence[Sequence[Option]]) -> float:
    """The seconds in which a plan computes again, of those in which all of all layers would be; copies do not count."""
    again = [{option.policy: option.seconds for option in ways if not option.on_host} for ways in layers]
    everything = sum(max(seconds.values()) for seconds in again)
    done = sum(seconds[option.policy] for seconds, option in zip(again, plan, strict=True))
    return done / everything if everything else 0.0


def _way(option: Option) -> tuple[Policy, bool]:
    return option.policy, option.on_host


def gib(size: float) -> str:
    """Bytes for a reader."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"

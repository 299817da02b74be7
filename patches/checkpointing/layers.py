"""What is known of one layer, and the ways that it therefore has to run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..blocks.policy import Policy
from ..blocks.run import Parts, Run
from . import bytes as formulas
from .host import buffer_size
from .meters import GraphMeter, LayerMeter
from .options import Option

# What a copy between a GPU and pinned memory does at least; how much of a layer's time it can hide behind; and what it
# costs although hidden, as a share of its own time.
HOST_BYTES_PER_SECOND = 2e10
OVERLAP = 0.8
INTERFERENCE = 0.03
# What upstream looks at in a layer, to checkpoint it or not.
_FLAG, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


@dataclass(frozen=True, slots=True)
class Shape:
    """A micro-batch: its tokens, and the pairs of them that may see each other."""

    tokens: int
    pairs: int

    def rounded_up(self) -> "Shape":
        """The next larger of few: numbers of five binary digits, at most a sixteenth more."""
        return Shape(_rounded_up(self.tokens), _rounded_up(self.pairs))

    def beyond(self, other: "Shape") -> float:
        """How many times as much this is, at most."""
        return max(self.tokens / other.tokens, self.pairs / other.pairs)


def _rounded_up(n: int) -> int:
    unit = 1 << max(0, n.bit_length() - 5)
    return -(-n // unit) * unit


@dataclass(frozen=True, slots=True)
class Rates:
    """What a measurement says of all layers of a kind.

    `products` and `attention` are the seconds that computing again takes for a token and for a pair; `graph` the bytes
    that were kept beside what a formula knows, and `given` those of a layer's input, for the micro-batch `of`.
    """

    products: float
    attention: float
    graph: int
    of: Shape
    given: int = 0

    def graph_for(self, shape: Shape) -> int:
        """The bytes for another micro-batch, at most."""
        return int(self.graph * shape.beyond(self.of))


@dataclass(slots=True, eq=False)
class Fused:
    """A layer that runs as blocks, as it was last read; `width` are the bytes of a number in its input."""

    parts: Parts
    width: int
    kind: tuple[Any, ...]
    meter: LayerMeter
    has_backward: bool

    @classmethod
    def of(cls, run: Run, x: torch.Tensor) -> "Fused":
        """The layer of a run, whose input is x [B, S, h]."""
        parts = run.parts
        kind = (
            parts.heads,
            tuple(p.shape for group in parts.groups for p in group.projections),
            run.attention.implementation,
            run.attention.keywords.get("sliding_window"),
        )
        trained = any(p.requires_grad for group in parts.groups for p in group.parameters())
        has_backward = x.requires_grad or trained
        return cls(parts, x.element_size(), (*kind, has_backward), LayerMeter(x.is_cuda), has_backward)

    def rates(self, shape: Shape) -> Rates | None:
        """What its meter found in a backward for `shape`; None before there was one."""
        if not self.has_backward:
            return Rates(0.0, 0.0, 0, shape)
        again, attention = self.meter.again_seconds, self.meter.attention_span.seconds()
        if again is None or attention is None:
            return None
        products = max(0.0, again - attention)
        return Rates(products / shape.tokens, attention / shape.pairs, self.meter.graph, shape)

    def options(self, shape: Shape, rates: Rates, *, host: bool) -> list[Option]:
        """The ways it has for a micro-batch; with `host`, those too that put something into host memory."""
        if not self.has_backward:
            return [Option(policy, False, 0, 0, 0, 0.0) for policy in (Policy.KEEP, Policy.INPUT)]
        graph, products = rates.graph_for(shape), rates.products * shape.tokens
        again = products + rates.attention * shape.pairs
        seconds = {Policy.KEEP: 0.0, Policy.ATTENTION: products, Policy.INPUT: again}
        options = []
        for policy, cost in seconds.items():
            kept = formulas.kept(self.parts, shape.tokens, policy, self.width, graph)
            work = formulas.work(self.parts, shape.tokens, policy, self.width)
            # The attention's gradients take as much as its graph.
            work += 2 * graph if policy is Policy.INPUT else graph
            options.append(Option(policy, False, kept, 0, work, cost))
            if host and policy is not Policy.KEEP and not (graph and policy is Policy.ATTENTION):
                sizes = formulas.offloaded(self.parts, shape.tokens, policy, self.width)
                moved, held = sum(sizes), sum(map(buffer_size, sizes))
                # One layer's is on its way while that of the next is used.
                cost += _transfer(moved, again)
                options.append(Option(policy, True, kept - moved, held, work, cost, fetched=2 * moved))
        return options


@dataclass(slots=True, eq=False)
class Foreign:
    """A layer that runs upstream's forward: either its graph keeps everything, or upstream checkpoints it."""

    kind: tuple[Any, ...]
    meter: GraphMeter

    @classmethod
    def of(cls, module: torch.nn.Module, *, is_below: bool) -> "Foreign":
        """The layer that a module is; `is_below` where nothing up to it is trained."""
        return cls((type(module), getattr(module, "attention_type", None), is_below), GraphMeter())

    def rates(self, shape: Shape) -> Rates | None:
        """What its meter found in a forward for `shape`; None before there was one."""
        seconds = self.meter.span.seconds()
        if seconds is None:
            return None
        return Rates(seconds / shape.tokens, 0.0, self.meter.graph, shape, self.meter.given)

    def options(self, shape: Shape, rates: Rates, *, host: bool) -> list[Option]:
        """It keeps everything, or its input and then makes all of it again while its backward runs."""
        del host
        kept = rates.graph_for(shape)
        given = min(kept, int(rates.given * shape.tokens / rates.of.tokens))
        return [
            Option(Policy.KEEP, False, kept, 0, kept // 2, 0.0),
            Option(Policy.INPUT, False, given, 0, kept + kept // 2, rates.products * shape.tokens),
        ]


def _transfer(size: int, compute: float) -> float:
    """Seconds that copying to the host and back costs a layer whose forward takes about `compute`."""
    each = size / HOST_BYTES_PER_SECOND
    return INTERFERENCE * 2 * each + 2 * max(0.0, each - OVERLAP * compute)


@contextmanager
def checkpointed(module: torch.nn.Module, flag: bool) -> Iterator[None]:
    """Within it, upstream checkpoints this layer, or does not, whatever the user has asked for."""
    held = vars(module)
    before = {name: held[name] for name in (_FLAG, _FUNCTION) if name in held}
    held[_FLAG] = flag
    held.setdefault(_FUNCTION, _checkpoint)
    try:
        yield
    finally:
        for name in (_FLAG, _FUNCTION):
            if name in before:
                held[name] = before[name]
            else:
                held.pop(name, None)


def _checkpoint(function: Any, *args: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

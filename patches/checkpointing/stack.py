"""A backbone's layers and the plan for each micro-batch.

The first forward keeps only each layer's input, the safest there is, and its backward measures what computing again
costs. From then on the plan depends on the micro-batch and on the memory that is left when it begins, and is looked up
where both have come before.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import compress
from typing import Any

import torch

from ..blocks import graphs
from ..blocks.policy import Policy, choosing
from ..blocks.run import Parts, Run
from . import weights
from .budget import Budget
from .host import Host
from .layers import Foreign, Fused, Rates, Shape, checkpointed
from .memory import Memory, allowed
from .meters import LayerMeter
from .options import Option, peak, stretch
from .plan import Plan, share_of
from .solver import solve, tightest

# Budgets are told apart by this share of what is allowed, so that plans are found again.
GRAIN = 1 / 256
# Micro-batches so many times as large as any before are measured again rather than reckoned from those.
STRETCH = 1.5
# Of what is allowed, once that has turned out to be too much; and how it grows back with each micro-batch that fits.
CUT, GROWTH = 0.98, 1.0005


class Stack:
    """The decoder layers of a backbone in order; `told` hears of each plan that is made."""

    def __init__(
        self,
        modules: Sequence[torch.nn.Module],
        trained: Sequence[torch.nn.Parameter],
        memory: Memory,
        budget: Budget,
        told: Callable[["Stack", Plan], None],
    ) -> None:
        self.modules, self.trained = tuple(modules), tuple(trained)
        # Bytes of the gradients of each, and of each layer.
        self._sizes = [p.nbytes for p in self.trained]
        sizes = dict(zip(map(id, self.trained), self._sizes, strict=True))
        self._layer_sizes = [sum(sizes.get(id(p), 0) for p in module.parameters()) for module in self.modules]
        self.memory, self.budget, self.told = memory, budget, told
        # Bytes of host memory that may be used, and who keeps tensors there.
        self.host_budget = 0
        self.host: Host | None = None
        # Of what is allowed, after that has turned out to be too much; and what other processes have at most.
        self.share = 1.0
        self.ceiling: int | None = None
        # The plan for the micro-batch that runs, what may be allocated at once, and what was expected to be.
        self.current: Plan | None = None
        self.limit = self.predicted = 0
        # Bytes of weights that stay and need not be made; and whether there is room for graphs, which hold memory.
        self.staying = 0
        # For which tokens and bytes they were last chosen, which walks all layers while the device waits.
        self._fitting: tuple[int, int] | None = None
        self.is_roomy = False
        self.shape = Shape(0, 0)
        self._index = {id(module): i for i, module in enumerate(self.modules)}
        self._layers: dict[int, Fused | Foreign] = {}
        self._rates: dict[tuple[Any, ...], Rates] = {}
        self._plans: dict[tuple[Shape, int, int], Plan] = {}
        # The micro-batch whose forward measures, and the one that `_rates` and `_after` are of.
        self._learning: Shape | None = None
        self._learned: Shape | None = None
        self._taken_in: Shape | None = None
        # Bytes that the rest of the model and the loss take once the backbone has run, and then the layers' backward;
        # what is held when each begins beyond what there was when the forward began; and the gradients born then.
        self._after = self._work = self._held = self._held_after = self._began = 0
        self._born_learning: list[int] = []
        # Plans since a micro-batch last came through, and the limit for its next attempt.
        self._tried: deque[tuple[Shape, Plan]] = deque(maxlen=8)
        self._attempt: int | None = None
        self._learns_on_host = self._learned_on_host = False
        # How attention has run, of which the graph of each kind was counted.
        self._ways: set[str] = set()
        self._new_ways: list[tuple[str, tuple[Any, ...], LayerMeter]] = []
        self._new_shape = Shape(1, 1)
        # The plan that did most again.
        self.worst: Plan | None = None

    @contextmanager
    def forward(self, shape: Shape) -> Iterator[None]:
        """Around a forward of the backbone for a micro-batch, whose layers may be differentiated."""
        self._decide(shape.rounded_up())
        firsts = self._firsts()
        with ExitStack() as stack:
            stack.push(self._landing)
            stack.enter_context(choosing(self._choose))
            for i, module in enumerate(self.modules):
                known = self._layers.get(i)
                if self._learning is not None and isinstance(known, Foreign) and i in firsts:
                    stack.enter_context(checkpointed(module, False))
                    stack.enter_context(known.meter.watching(module))
                elif isinstance(known, Foreign) or self._policy(i) is not Policy.KEEP:
                    # A fused layer looks at its policy; but with the flag upstream fills no cache, which would be kept.
                    stack.enter_context(checkpointed(module, self._policy(i) is not Policy.KEEP))
            yield
        for i, module in enumerate(self.modules):
            if i not in self._layers:
                above = self.modules[: i + 1]
                is_below = not any(p.requires_grad for layer in above for p in layer.parameters())
                self._layers[i] = Foreign.of(module, is_below=is_below)

    def _landing(self, *error: Any) -> None:
        """The forward is over, or was interrupted: nothing is held for copies to the host any more."""
        if self.host is not None:
            self.host.land()

    def ended(self, output: torch.Tensor) -> None:
        """The backbone has given its output; the rest of the model and the loss come until that gets its gradient."""
        if self._learning is None or not output.requires_grad:
            return
        shape, before = self._learning, self.memory.allocated()
        self._held_after = before - self._began
        self.memory.reset()

        def loss_is_done(grad: torch.Tensor) -> None:
            self._after = max(0, self.memory.peak() - before)
            self.memory.reset()
            held = self.memory.allocated()
            self._held = held - self._began

            def backward_is_done() -> None:
                self._work = max(0, self.memory.peak() - held)
                self._learned, self._learned_on_host = shape, self._learns_on_host

            torch.autograd.Variable._execution_engine.queue_callback(backward_is_done)

        output.register_hook(loss_is_done)  # type: ignore[no-untyped-call]  # torch's

    def tighten(self, factor: float) -> bool:
        """Plan the next attempt with less, as the last took too much; False if that was the tightest there is."""
        if self.current is None:
            # While it learns there is one thing that takes less.
            self._learns_on_host, before = self.host_budget > 0, self._learns_on_host
            return self._learns_on_host and not before
        tried = list(self._tried)
        self._tried.clear()
        if all(plan.options == tightest(self._expected(shape)[0], self.host_budget) for shape, plan in tried):
            return False
        self._attempt = int(factor * (self.predicted if self._attempt is None else self._attempt))
        self.share *= CUT
        return True

    def came_through(self) -> None:
        """A micro-batch has run forward and backward."""
        self._tried.clear()
        self._attempt = None
        self.share = min(1.0, self.share * GROWTH)

    def largest(self, below: int | None = None) -> int | None:
        """About how many tokens the tightest plan would fit, at the last micro-batch's length; None if unknown.

        Fewer than `below`, or than that micro-batch had.
        """
        if self._learned is None or not self._rates:
            return None
        births, others = self._unborn()
        left = self._left(others)
        fits, too_many = 0, self.shape.tokens if below is None else below
        while too_many > fits + 16:
            half = (too_many + fits) // 2
            shape = Shape(half, max(1, self.shape.pairs * half // self.shape.tokens))
            options, after = self._expected(shape)
            if peak(tightest(options, self.host_budget), after, births) <= left:
                fits = half
            else:
                too_many = half
        return fits

    def _allowed(self) -> int:
        own = allowed(self.budget, self.memory)
        return own if self.ceiling is None else min(own, self.ceiling)

    def _unborn(self) -> tuple[list[int], int]:
        """Bytes of gradients that are not there yet: those of each layer, and all others."""
        unborn = sum(compress(self._sizes, [p.grad is None for p in self.trained]))
        share = unborn / max(1, sum(self._sizes))
        births = [int(share * size) for size in self._layer_sizes]
        return births, unborn - sum(births)

    def _left(self, others: int) -> int:
        """Bytes that a plan may take now, weights that stay among them.

        Gradients of layers come while activations go; the `others` that are not there yet come at any time.
        """
        self.limit = int(self._allowed() * self.share)
        if self._attempt is not None:
            self.limit = min(self.limit, self._attempt)
        return self.limit - self.memory.allocated() - others + weights.staying(self._fused())

    def _fused(self) -> list[Parts]:
        return [layer.parts for _, layer in sorted(self._layers.items()) if isinstance(layer, Fused)]

    def at_rest(self) -> None:
        """What runs now is no training, and may need all memory that is not taken for good."""
        weights.drop(self._fused())
        self._fitting = None
        self.host = None

    def _policy(self, i: int) -> Policy:
        return Policy.INPUT if self.current is None else self.current.options[i].policy

    def _choose(self, module: torch.nn.Module, x: torch.Tensor, run: Run) -> Policy:
        """What a fused layer keeps; asked when it runs."""
        i = self._index.get(id(module))
        if i is None or not run.is_differentiable:
            return Policy.KEEP
        known = self._layers.get(i)
        if not isinstance(known, Fused) or known.parts is not run.parts:
            self._layers[i] = Fused.of(run, x)
            self._fitting = None
            if isinstance(known, Foreign) or (known is not None and known.kind != self._layers[i].kind):
                self._plans.clear()
        run.may_hold = self.is_roomy
        fused = self._layers[i]
        assert isinstance(fused, Fused), "it was made so"
        way = "plain" if run.attention.is_plain else "graph" if run.attention.documents is None else "documents"
        if self._learning is not None and i in self._firsts():
            run.meter = fused.meter = LayerMeter(x.is_cuda)
            self._ways.add(way)
        elif way not in self._ways and self.current is not None and self._policy(i) is not Policy.INPUT:
            # Padding, say, for the first time: this one may take more than was planned, and the next are known.
            run.meter = meter = LayerMeter(x.is_cuda, forward=True)
            self._new_ways.append((way, fused.kind, meter))
            self._new_shape = self.shape
        if self._is_on_host(i):
            run.host = self.host = self.host or Host(x.device, self.host_budget)
        return self._policy(i)

    def _is_on_host(self, i: int) -> bool:
        if self.current is not None:
            return self.current.options[i].on_host
        return self._learns_on_host and i < len(self.modules) - 1

    def _firsts(self) -> set[int]:
        """The first layer of each kind, which stands for all."""
        firsts: dict[tuple[Any, ...], int] = {}
        for i in sorted(self._layers):
            firsts.setdefault(self._layers[i].kind, i)
        return set(firsts.values())

    def _decide(self, shape: Shape) -> None:
        """Set the plan for a micro-batch, or find that there is something to learn first."""
        self.current, self._learning, self.shape = None, None, shape
        births, others = self._unborn()
        if not self._is_known(shape):
            self._learns_on_host = self._learns_on_host or self._is_large(shape)
            self._learning, self._began, self._born_learning = shape, self.memory.allocated(), births
            return
        left = self._left(others)
        grain = max(1, int(self.limit * GRAIN))
        key = shape, left // grain * grain, sum(births)
        if key not in self._plans:
            self._plans[key] = self._solve(*key[:2], births)
        self.current = self._plans[key]
        self._tried.append((shape, self.current))
        if self.worst is None or self.current.share > self.worst.share:
            self.worst = self.current
        # Kept activations save more for a byte, so weights get what these leave over.
        spare = left - self.current.peak if self.current.share == 0.0 and self.budget.kind != "min" else 0
        # Graphs take about as much as they spare, and what they take is no longer left.
        was_roomy, self.is_roomy = self.is_roomy, spare > (0 if self.is_roomy else self.current.peak)
        if was_roomy and not self.is_roomy:
            graphs.drop()
        fitting = shape.tokens, int(weights.SHARE * spare) // grain * grain
        if fitting != self._fitting:
            self._fitting, self.staying = fitting, weights.fit(self._fused(), *fitting)
        self.predicted = self.limit - left + self._taken(self.current, births) + self.staying
        self.told(self, self.current)

    def _is_known(self, shape: Shape) -> bool:
        """Whether all layers are known well enough for a micro-batch; takes in what was measured since."""
        if self._learned is None or len(self._layers) < len(self.modules):
            return False
        if self._taken_in is not self._learned:
            measured = [(self._layers[i].kind, self._layers[i].rates(self._learned)) for i in self._firsts()]
            self._rates |= {kind: rates for kind, rates in measured if rates is not None}
            self._plans.clear()
            if all(rates is not None for _, rates in measured):
                self._taken_in = self._learned
        for way, kind, meter in self._new_ways:
            self._ways.add(way)
            rates = self._rates.get(kind)
            # Nothing is known yet of a layer that was another before: patches came or went.
            if rates is not None and meter.graph > rates.graph_for(self._new_shape):
                self._rates[kind] = replace(rates, graph=int(meter.graph / self._new_shape.beyond(rates.of)))
                self._plans.clear()
        self._new_ways = []
        if not self._is_any_known():
            return False
        return shape.tokens <= STRETCH * self._learned.tokens or self._is_small(shape)

    def _is_any_known(self) -> bool:
        """Whether all layers are known for some micro-batch."""
        if self._learned is None or len(self._layers) < len(self.modules):
            return False
        return all(layer.kind in self._rates for layer in self._layers.values())

    def _is_large(self, shape: Shape) -> bool:
        """Whether not even the inputs of all layers are expected to fit on the device."""
        if self.host_budget == 0 or not self._is_any_known():
            return False
        births, others = self._unborn()
        options, after = self._expected(shape)
        return peak(tightest(options), after, births) > self._left(others)

    def _is_small(self, shape: Shape) -> bool:
        """Whether everything may be kept by far, so that nothing need be known exactly."""
        births, others = self._unborn()
        options, after = self._expected(shape)
        return 2 * peak([ways[0] for ways in options], after, births) < self._left(others)

    def _in_learning(self) -> list[Option]:
        """What each layer did in the micro-batch that was measured: all but the input was computed again."""
        assert self._learned is not None, "asked once that is known"
        firsts, last = self._firsts(), len(self.modules) - 1
        options = []
        for i, ways in enumerate(self._formulas(self._learned, host=self._learned_on_host)):
            inputs = [way for way in ways if way.policy is Policy.INPUT]
            # A layer of upstream's that was measured kept everything.
            whole = isinstance(self._layers[i], Foreign) and i in firsts
            options.append(ways[0] if whole else inputs[0 if i == last else -1])
        return options

    def _expected(self, shape: Shape) -> tuple[list[list[Option]], int]:
        """(what each layer may do for a micro-batch, bytes that the rest of the model takes once all have run)."""
        assert self._learned is not None, "asked once that is known"
        learned, scale = self._in_learning(), shape.tokens / self._learned.tokens
        held = sum(option.kept for option in learned)
        factor = stretch(self._work, learned, self._born_learning)
        # What the rest of the model holds meanwhile, and while the loss runs.
        rest = int(scale * max(0, self._held - held))
        after = int(scale * (self._after + max(0, self._held_after - held)))

        def scaled(option: Option, same: Option) -> Option:
            # More tokens take as much more, though part of what was measured may be weights, which do not grow.
            return replace(option, work=int(factor * max(option.work, scale * same.work)) + rest)

        pairs = (self._formulas(wanted, host=self.host_budget > 0) for wanted in (shape, self._learned))
        return [list(map(scaled, *pair)) for pair in zip(*pairs, strict=True)], after

    def _formulas(self, shape: Shape, *, host: bool) -> list[list[Option]]:
        layers = (self._layers[i] for i in range(len(self.modules)))
        return [layer.options(shape, self._rates[layer.kind], host=host) for layer in layers]

    def _solve(self, shape: Shape, budget: int, births: Sequence[int]) -> Plan:
        options, after = self._expected(shape)
        keeping = [ways[0] for ways in options]
        fits = peak(keeping, after, births) <= budget
        found = keeping if fits else solve(options, budget, after, self.host_budget, births)
        plan = tightest(options, self.host_budget) if found is None else found
        return Plan(plan, shape, peak(plan, after, births), after, share_of(plan, options), found is not None)

    def _taken(self, plan: Plan, births: Sequence[int]) -> int:
        """Bytes that a plan takes beyond what is allocated: what graphs keep for its layers is."""
        held = [graphs.tokens_held(module) for module in self.modules]
        if not any(held):
            return plan.peak
        same = [Shape(tokens, 1).rounded_up().tokens == plan.shape.tokens for tokens in held]
        left = [
            replace(o, kept=0, work=0, fetched=0) if is_same else o
            for o, is_same in zip(plan.options, same, strict=True)
        ]
        return peak(left, plan.after, births)

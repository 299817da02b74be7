"""bitsandbytes' Adam, 8 and 32 bits, over many small tensors: those that can go together are updated by one launch.

bitsandbytes updates one tensor after another and waits for the device after each; with the hundreds of tensors of an
adapter the device is idle meanwhile. Its update looks at single elements, in 8 bits at blocks of 256, so tensors that
lie one after another get the same bits from one call of its own `update_step`. Parameters and gradients are copied
together for that; states stay so: what the optimizer keeps of a parameter are views of one tensor for all.
"""

import inspect
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .scope import Method, replaced, within

Group = dict[str, Any]
State = dict[str, Any]
Update = Callable[[Any, Group, torch.Tensor, int, int], None]
"""bitsandbytes' `update_step`: the optimizer, a group, a parameter of it, and the positions of both."""

BLOCK = 256
# A larger tensor keeps the device busy by itself, and copies of it would cost time and memory.
LARGEST = 2**23
# Elements of one launch, which bounds the memory of the copies.
LAUNCH = 2**25
ADAMS = ("Adam", "Adam8bit", "Adam32bit", "AdamW", "AdamW8bit", "AdamW32bit")
# What the optimizer keeps of a parameter beside its step, by the dtype of state1.
KEPT = {torch.float32: ("state1", "state2"), torch.uint8: ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2")}
KEYS = {dtype: {"step", *names} for dtype, names in KEPT.items()}
_PLAIN = (torch.nn.Parameter, torch.Tensor)


def one_launch(trainer: type) -> dict[str, Method]:
    """Training in which bitsandbytes' Adam takes few launches for a step."""
    return within(trainer, _scope, "_inner_training_loop")


@contextmanager
def _scope(*args: Any, **kwargs: Any) -> Iterator[None]:
    from bitsandbytes import optim
    from bitsandbytes.optim import optimizer as upstream

    # The classes inherit `update_step`; where it is defined it stays, and is seen to be upstream's. A class that has
    # one itself is of another bitsandbytes, or this trainer trains within another.
    classes = (vars(optim).get(name) for name in ADAMS)
    kinds = [kind for kind in classes if kind is not None and "update_step" not in vars(kind)]
    steps = _Steps(upstream)
    with replaced(upstream, {"sync_gpu": steps.sync_gpu} if kinds else {}):
        try:
            for kind in kinds:
                kind.update_step = steps.update_step
            yield
        finally:
            for kind in kinds:
                if vars(kind).get("update_step") is steps.update_step:
                    del kind.update_step


def _is_ordered(device: torch.device) -> bool:
    """Whether bitsandbytes' launches, which take CUDA's default stream, run in the order of torch's."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.current_stream(device).cuda_stream == 0)


class _Steps:
    """Stands in for bitsandbytes' update of one parameter, and for its waiting, while a trainer trains."""

    def __init__(self, upstream: Any) -> None:
        self.base = upstream.Optimizer8bit
        self.original: Update = upstream.Optimizer2State.update_step
        self.wait = upstream.sync_gpu
        self.without_wait: torch.Tensor | None = None
        self.joint: dict[Any, _Joint | None] = {}

        def update_step(optimizer: Any, group: Group, p: torch.Tensor, gindex: int, pindex: int) -> None:
            self.update(optimizer, group, p, gindex, pindex)

        self.update_step = update_step

    def update(self, optimizer: Any, group: Group, p: torch.Tensor, gindex: int, pindex: int) -> None:
        """Update a parameter, by itself or with those of its group, unless it was with another of this step."""
        if optimizer not in self.joint:
            self.joint[optimizer] = _Joint(optimizer, self.original) if self._is_as_upstream(optimizer) else None
        joint = self.joint[optimizer]
        if joint is not None and joint.has_updated(group, p, gindex, pindex):
            self.without_wait = p
        else:
            self.original(optimizer, group, p, gindex, pindex)
            self.without_wait = p if not optimizer.is_paged and _is_ordered(p.device) else None

    def sync_gpu(self, t: torch.Tensor) -> None:
        """Wait for the device, unless it is after a parameter whose update nobody has to wait for."""
        if t is not self.without_wait:
            self.wait(t)
        self.without_wait = None

    def _is_as_upstream(self, optimizer: Any) -> bool:
        """Whether an optimizer steps as upstream's do, parameter by parameter, and never looks at a whole tensor."""
        kind, args = type(optimizer), optimizer.args
        return (
            optimizer.optimizer_name == "adam"
            and not optimizer.is_paged
            and kind.update_step is self.update_step
            and kind.get_config is self.base.get_config
            # torch wraps the step of each class, for its hooks.
            and inspect.unwrap(kind.step) is inspect.unwrap(self.base.step)
            and args.max_unorm == 0
            # Older versions have these.
            and getattr(args, "percentile_clipping", 100) >= 100
            and getattr(args, "block_wise", True)
        )


class _Joint:
    """One optimizer: which parameters were updated ahead of their turn, and where the states of those lie."""

    def __init__(self, optimizer: Any, original: Update) -> None:
        self.optimizer = optimizer
        self.original = original
        # The gradient with which a parameter was looked at, its version, and whether the parameter was updated.
        self.marks: dict[torch.Tensor, tuple[Any, int, bool]] = {}
        self.plans: dict[int, list[_Plan]] = {}

    def has_updated(self, group: Group, p: torch.Tensor, gindex: int, pindex: int) -> bool:
        """Whether a parameter was updated with others; done now if it is the first of those."""
        grad: Any = p.grad
        marked, version, updated = self.marks.pop(p, (None, 0, False))
        # A mark that an interrupted step has left is of another gradient, or of what was in it before.
        if marked is grad and version == grad._version:
            return updated
        if self._kind(p, gindex, pindex) is None:
            return False
        self._update(group, gindex, pindex)
        return self.marks.pop(p)[2]

    def _kind(self, p: torch.Tensor, gindex: int, pindex: int) -> tuple[Any, ...] | None:
        """What parameters that go together have in common; None for one that goes alone."""
        grad, state = p.grad, self.optimizer.state.get(p)
        dtype = getattr(state["state1"], "dtype", None) if state and "state1" in state else None
        if grad is None or dtype not in KEYS or state.keys() != KEYS[dtype]:
            return None
        step, overrides = state["step"], self.optimizer.mng
        if (
            # bitsandbytes makes a state just before its first update.
            step == 0
            or p.numel() > LARGEST
            # Where the last block is not whole, the kernel takes other codes than 0 for what is missing.
            or (dtype is torch.uint8 and p.numel() % BLOCK)
            or type(p) not in _PLAIN
            or type(grad) not in _PLAIN
            or grad.dtype is not p.dtype
            or grad.device != p.device
            or not p.is_contiguous()
            or not grad.is_contiguous()
            or id(p) in overrides.pid2config
            or (gindex, pindex) in overrides.index2config
        ):
            return None
        return p.dtype, p.device, dtype, step

    def _update(self, group: Group, gindex: int, pindex: int) -> None:
        """Update what can go together of a group's parameters from `pindex` on, and mark all that were looked at."""
        params = group["params"]
        # torch only warns of a parameter that is there twice, and bitsandbytes updates it twice.
        end = len(params) if len(set(map(id, params))) == len(params) else pindex + 1
        cohorts: dict[tuple[Any, ...], list[torch.Tensor]] = defaultdict(list)
        for index, p in enumerate(params[pindex:end], pindex):
            kind = self._kind(p, gindex, index)
            if kind is not None and p not in self.marks:
                cohorts[kind].append(p)
        before, self.plans[gindex] = self.plans.get(gindex, []), []
        for together in (portion for cohort in cohorts.values() for portion in _portions(cohort)):
            plan = self._plan(together, before)
            if plan is not None:
                self.plans[gindex].append(plan)
                plan.update(self.optimizer, self.original, group, gindex, pindex)
            for p in together:
                grad: Any = p.grad
                self.marks[p] = grad, grad._version, plan is not None
        for plan in before:
            if plan not in self.plans[gindex]:
                plan.dissolve(self.optimizer.state)

    def _plan(self, params: list[torch.Tensor], before: "list[_Plan]") -> "_Plan | None":
        """How these parameters go together, as in the last step if nothing has changed; None if they do not."""
        states = [self.optimizer.state[p] for p in params]
        if len(params) == 1 or not _is_ordered(params[0].device):
            return None
        known = next((plan for plan in before if plan.is_of(params, states)), None)
        return known or (_Plan(params, states) if _fit(params, states) else None)


def _portions(params: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Parameters in their order, in lists of at most LAUNCH elements."""
    portion, total = list[torch.Tensor](), 0
    for p in params:
        if total + p.numel() > LAUNCH:
            yield portion
            portion, total = [], 0
        portion.append(p)
        total += p.numel()
    yield portion


def _fit(params: list[torch.Tensor], states: list[State]) -> bool:
    """Whether the states of parameters of one kind are as bitsandbytes makes them, with the same codes."""
    first = states[0]
    for p, state in zip(params, states, strict=True):
        for name in KEPT[first["state1"].dtype]:
            kept = state[name]
            if kept.dtype is not first[name].dtype or kept.device != p.device or not kept.is_contiguous():
                return False
            if name.startswith("qmap"):
                fits = kept is first[name] or torch.equal(kept, first[name])
            else:
                fits = kept.shape == ((p.numel() // BLOCK,) if name.startswith("absmax") else p.shape)
            if not fits:
                return False
    return True


def _views(flat: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors shaped as those in `like`, one after another, in the memory of `flat` [all their elements]."""
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


class _Plan:
    """Parameters that go together: one tensor for each kind of state, and copies of parameters and gradients.

    Between steps the copies hold no memory.
    """

    def __init__(self, params: list[torch.Tensor], states: list[State]) -> None:
        self.params, self.states = params, states
        self.names = KEPT[states[0]["state1"].dtype]
        self.state: State = {}
        for name in self.names:
            kept = [state[name] for state in states]
            if name.startswith("qmap"):
                self.state[name] = kept[0]
                continue
            self.state[name] = torch.cat([tensor.view(-1) for tensor in kept])
            for state, view in zip(states, _views(self.state[name], kept), strict=True):
                state[name] = view
        # Held so that no other tensor can come to lie there.
        self.kept = [state[name] for state in states for name in self.names]
        self.pointers = self._pointers()
        size = sum(p.numel() for p in params)
        self.param, self.grad = (torch.empty(size, dtype=params[0].dtype, device=params[0].device) for _ in range(2))
        self.param_views, self.grad_views = _views(self.param, params), _views(self.grad, params)
        self.param.grad = self.grad

    def _pointers(self) -> list[int]:
        return [state[name].data_ptr() for state in self.states for name in self.names]

    def is_of(self, params: list[torch.Tensor], states: list[State]) -> bool:
        """Whether it is for these parameters, and their states are still where it has put them."""
        return (
            len(params) == len(self.params)
            and all(map(operator.is_, params, self.params))
            and all(map(operator.is_, states, self.states))
            and self._pointers() == self.pointers
        )

    @torch.no_grad()
    def update(self, optimizer: Any, original: Update, group: Group, gindex: int, pindex: int) -> None:
        """Update all by bitsandbytes' function, which takes them for the one parameter at these positions."""
        state = {"step": self.states[0]["step"], **self.state}
        self._resize(1)
        torch._foreach_copy_(self.param_views, self.params)
        torch._foreach_copy_(self.grad_views, [p.grad for p in self.params])  # type: ignore[misc]  # each has one
        optimizer.state[self.param] = state
        try:
            original(optimizer, group, self.param, gindex, pindex)
        finally:
            # After an interrupt too, so that parameters and states are of the same step.
            del optimizer.state[self.param]
            torch._foreach_copy_(self.params, self.param_views)
            for each in self.states:
                each["step"] = state["step"]
            self._resize(0)

    def _resize(self, times: int) -> None:
        """Take the memory of the copies, or with 0 give it back."""
        for copies in (self.param, self.grad):
            copies.untyped_storage().resize_(times * copies.nbytes)

    def dissolve(self, states: dict[torch.Tensor, State]) -> None:
        """Give the states that are still here memory of their own, lest each keeps that of all."""
        kept = iter(self.kept)
        for p, state in zip(self.params, self.states, strict=True):
            for name in self.names:
                if state[name] is next(kept) and states.get(p) is state and not name.startswith("qmap"):
                    state[name] = state[name].clone()

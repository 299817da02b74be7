"""The forward of a backbone, around which each of its layers gets its policy."""

import functools
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..kernels.notices import say_once
from ..kernels.ownership import saving_is_plain
from . import full_masks
from .budget import Budget, from_environment, host_bytes
from .layers import Shape
from .memory import Cuda, Memory
from .plan import Plan, gib
from .stack import Stack

Forward = Callable[..., Any]
_stacks: WeakKeyDictionary[torch.nn.Module, Stack] = WeakKeyDictionary()
# The least that a process has, by backbone.
_ceilings: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()
# What was allowed for one model and not by the environment.
_budgets: WeakKeyDictionary[torch.nn.Module, Budget] = WeakKeyDictionary()


def memory_of(device: torch.device) -> Memory | None:
    """The memory that plans are made for; None where nothing is known of it, and the user's flag decides."""
    return Cuda(device) if device.type == "cuda" else None


def host_budget() -> int:
    """Bytes of host memory for this process: its share of what all on this host may take; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    import psutil

    available = min(psutil.virtual_memory().available, _cgroup_bytes())
    return host_bytes(available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _cgroup_bytes() -> int:
    """What a container's limit leaves; without one, more than there is."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return sys.maxsize
    return sys.maxsize if limit == "max" else max(0, int(limit) - int(used))


def stack_of(module: torch.nn.Module) -> Stack | None:
    """The layers of a backbone with what is known of them; None if it has none, or no memory to plan for."""
    layers = _layers_of(module)
    known = _stacks.get(module)
    if known is not None and known.modules == layers:
        return known
    # Nobody splits a layer, and where nothing is planned this is asked at every step.
    devices = {p.device for layer in layers for p in itertools.islice(layer.parameters(), 1)}
    if len(devices) > 1:
        say_once("memory: nothing is planned, because the layers are on several devices")
    if len(devices) != 1:
        return None
    memory = memory_of(devices.pop())
    if memory is None:
        say_once("memory: nothing is planned without a GPU; layers are checkpointed as they were asked to be")
        return None
    trained = [p for p in module.parameters() if p.requires_grad]
    budget = _budgets.get(module) or from_environment()
    stack = _stacks[module] = Stack(layers, trained, memory, budget, _tell)
    stack.host_budget, stack.ceiling = host_budget(), _ceilings.get(module)
    for name in _superseded(layers):
        say_once(f"memory: {name} is superseded by the plan, which says for each layer what it computes again")
    return stack


def _superseded(layers: Sequence[torch.nn.Module]) -> Iterator[str]:
    """What the user has asked of checkpointing that says which layers do it, or what they keep."""
    flags = {bool(getattr(layer, "gradient_checkpointing", False)) for layer in layers}
    if len(flags) > 1:
        yield "every_n_layers"
    functions = (getattr(layer, "_gradient_checkpointing_func", None) for layer in layers)
    if any("context_fn" in getattr(function, "keywords", {}) for function in functions):
        yield "selective checkpointing"


def allow(model: torch.nn.Module, budget: Budget) -> None:
    """Let the plans of all backbones in a model take so much."""
    for module in model.modules():
        if _layers_of(module):
            _budgets[module] = budget
            if module in _stacks:
                _stacks[module].budget = budget


def stacks() -> list[Stack]:
    """All that are planned in this process."""
    return list(_stacks.values())


def stacks_of(model: torch.nn.Module) -> list[Stack]:
    """The layers of all backbones in a model that are planned."""
    return [stack for module in model.modules() if (stack := _stacks.get(module)) is not None]


def agree(model: torch.nn.Module, device: torch.device) -> None:
    """Let all processes plan with the memory of the one that has least on its device. To be called by all of them."""
    memory = memory_of(device)
    if memory is None:
        return
    on_gpu = torch.distributed.get_backend() == "nccl"
    least = torch.tensor(memory.capacity(), device=device if on_gpu else "cpu")
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    for module in model.modules():
        if _layers_of(module):
            _ceilings[module] = int(least)
            if module in _stacks:
                _stacks[module].ceiling = int(least)


def _layers_of(module: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    """The layers that transformers would checkpoint one by one."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList) and all(hasattr(layer, "gradient_checkpointing") for layer in child):
            return tuple(child)
    return ()


def _tell(stack: Stack, plan: Plan) -> None:
    if plan.share > 0.0 or not plan.fits:
        say_once(told(stack), f"memory plan {id(stack)}")


def told(stack: Stack) -> str:
    """The plan of the last micro-batch, in a line."""
    plan = stack.current
    if plan is None:
        return f"memory: {stack.shape.tokens} tokens, nothing is known yet"
    staying = f", {gib(stack.staying)} of weights kept unpacked" if stack.staying else ""
    allowed = "as little as goes" if stack.budget.kind == "min" else f"of {gib(stack.limit)} allowed"
    return (
        f"memory: {plan.shape.tokens} tokens, {', '.join(plan.groups())}; {plan.share:.0%} of computing all again"
        f"{staying}, {gib(stack.predicted)} expected {allowed}"
    )


def _shape_of(given: dict[str, Any]) -> Shape | None:
    """The micro-batch of a call of the backbone."""
    x = given.get("inputs_embeds")
    x = given.get("input_ids") if x is None else x
    if not isinstance(x, torch.Tensor) or x.dim() < 2:
        return None
    rows, length = x.shape[:2]
    return Shape(rows * length, rows * length * length) if rows * length else None


def backbone(original: Forward) -> Forward:
    """The forward of a model whose decoder layers are in a ModuleList of its own. Raises ValueError for another."""
    names = [name for name in inspect.signature(original).parameters if name != "self"]
    if not {"input_ids", "inputs_embeds"} <= set(names):
        raise ValueError("the model takes no input_ids and no inputs_embeds")

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            if not self.training and self in _stacks:
                _stacks[self].at_rest()
            return original(self, *args, **kwargs)
        if getattr(self, "_is_replica", False):
            # Of nn.DataParallel, which makes them anew for each forward.
            return original(self, *args, **kwargs)
        if "attention_mask" in kwargs:
            kwargs["attention_mask"] = full_masks.answering(self, kwargs["attention_mask"])
        shape = _shape_of({**dict(zip(names, args, strict=False)), **kwargs})
        stack = None if shape is None else stack_of(self)
        if stack is None or shape is None:
            return original(self, *args, **kwargs)
        if not saving_is_plain():
            say_once("memory: nothing is planned, because somebody else takes what is saved (activation_offloading)")
            return original(self, *args, **kwargs)
        with stack.forward(shape):
            output = original(self, *args, **kwargs)
        stack.ended(output[0] if isinstance(output, tuple) else output.last_hidden_state)
        return output

    return forward

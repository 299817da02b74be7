"""What a training costs between two logs: time, tokens, memory, and the needed share of what the device can do."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .flops import Batch, count, needed
from .history import MFU, PEAK, PLANNED, SAMPLED, SECONDS, SPEED
from .peaks import peak_flops
from .phases import Phases

_PLANS = "sloth_plugins.patches.checkpointing.backbone"
_HALF = (torch.float16, torch.bfloat16)


class Meter:
    """Measures one process of one training. Nothing waits for the device but `read`, which is called once logging has.

    `model` is the one that is trained, `args` a TrainingArguments.
    """

    def __init__(self, model: Any, args: Any) -> None:
        self._model = model
        self._device = torch.device(args.device)
        self._needed = needed(model)
        self._peak_flops = _peak_flops(model, args) if self._needed is not None else None
        self._windows = tuple(self._needed.pairs) if self._needed is not None and self._peak_flops is not None else ()
        self._peak_bytes = 0
        self.is_paused = False
        self.phases = Phases(self._device)
        self.begin(0)

    def begin(self, step: int) -> None:
        """The training begins, or goes on, after this optimizer step."""
        self._step, self._since, self._paused = step, time.perf_counter(), 0.0
        self._sums: dict[Any, torch.Tensor] = {}
        # Whether every micro-batch since had tokens, and had labels.
        self._has_tokens = self._has_labels = True

    def batch(self, inputs: Any) -> None:
        """A micro-batch was computed."""
        found = count(inputs, self._windows)
        self._has_tokens &= found is not None
        self._has_labels &= found is not None and found.labels is not None
        for name, value in _named(found) if found is not None else ():
            self._add(name, value)

    def sampled(self, batch: Any) -> None:
        """Completions were sampled, if this is a batch of them; what is in their mask [batch, completion] counts."""
        mask = batch.get("completion_mask") if isinstance(batch, Mapping) else None
        if isinstance(mask, torch.Tensor):
            self._add("sampled", mask.sum())

    def _add(self, name: Any, value: torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around evaluation and saving, which are no training."""
        if self.is_paused:  # an evaluation of several data sets evaluates each
            yield
            return
        began, self.is_paused = time.perf_counter(), True
        self.phases.enter()
        try:
            yield
        finally:
            self.phases.leave()
            self.is_paused = False
            self._paused += time.perf_counter() - began

    def read(self, step: int) -> dict[str, float]:
        """What is to be logged at an optimizer step for those since the last one, and begin anew.

        To be called when the device has nothing left to do.
        """
        steps = step - self._step
        seconds = time.perf_counter() - self._since - self._paused
        if steps <= 0 or seconds <= 0:
            return {}
        sums = {name: int(value) for name, value in self._sums.items()}
        self._peak_bytes = max(self._peak_bytes, peak_bytes(self._device))
        found = {SECONDS: round(seconds / steps, 5)}
        if self._has_tokens and "tokens" in sums:
            found[SPEED] = round(sums["tokens"] / seconds, 1)
        phases = self.phases.read()
        found |= {f"{phase}_seconds": round(spent / steps, 5) for phase, spent in phases.items()}
        if "sampled" in sums and phases.get("rollout"):
            found[SAMPLED] = round(sums["sampled"] / phases["rollout"], 1)
        found[PEAK] = round(self._peak_bytes / 2**30, 3)
        planned = planned_bytes(self._model)
        if planned:
            found[PLANNED] = round(planned / 2**30, 3)
        if self._needed is not None and self._peak_flops is not None and self._has_labels and "labels" in sums:
            flops = self._needed.of(sums["tokens"], sums["labels"], {w: sums[w] for w in self._windows})
            found[MFU] = round(flops / seconds / self._peak_flops, 4)
        self.begin(step)
        return found


def _named(batch: Batch) -> Iterator[tuple[Any, torch.Tensor]]:
    yield "tokens", batch.tokens
    if batch.labels is not None:
        yield "labels", batch.labels
    yield from batch.pairs.items()


def peak_bytes(device: torch.device) -> int:
    """The most bytes that torch had allocated on a GPU, or that the process had where there is none; 0 if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def planned_bytes(model: Any) -> int:
    """The most bytes that the memory plans of a model expect; 0 where nothing is planned."""
    plans = sys.modules.get(_PLANS)
    stacks = plans.stacks_of(model) if plans is not None else []
    return max((int(stack.predicted) for stack in stacks if stack.current is not None), default=0)


def _peak_flops(model: Any, args: Any) -> float | None:
    """FLOP/s of what a process trains on; None on a CPU, on an unknown card, in full precision, or over several."""
    device = torch.device(args.device)
    if device.type != "cuda" or args.n_gpu > 1 or len({p.device for p in model.parameters()}) > 1:
        return None
    in_half = args.bf16 or args.fp16 or getattr(model, "dtype", None) in _HALF
    return peak_flops(torch.cuda.get_device_name(device)) if in_half else None

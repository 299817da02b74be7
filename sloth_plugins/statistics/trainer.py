"""The patch of Trainer that measures: around the training, each micro-batch, its phases, what is no training, each log.

It stands here and not among the patches, which know nothing of the runtime; `patches/trainer.py` names it.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..processes import say
from .flops import is_rollouts
from .history import History
from .meter import Meter
from .patterns import Watch
from .phases import SYNC, in_phases, is_phase
from .picture import draw
from .summary import lines

Method = Callable[..., Any]
Wrap = Callable[[Method], Method]


class _Run:
    """One training of a trainer."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.meter = Meter(trainer.model, trainer.args)
        self._watch: Watch | None = None
        self._rollouts: Any = None

    def fetch(self) -> None:
        """The micro-batches of a step are about to be fetched. What comes before the first is no training."""
        if self._watch is None:
            state = self._trainer.state
            self._watch = Watch(state.max_steps)
            for entry in state.log_history:  # of a run that is resumed; what it shows was told then
                for _ in self._watch.see(entry):
                    pass
            self.meter.begin(state.global_step)

    def compute(self, inputs: Any) -> None:
        """A loss is about to be computed, of what was sampled where the trainer samples."""
        self._rollouts = inputs if is_rollouts(inputs) else None

    def batch(self, inputs: Any) -> None:
        """A micro-batch was computed; what Trainer has fetched for it may be prompts alone."""
        self.meter.batch(inputs if self._rollouts is None else self._rollouts)

    def log(self, logs: dict[str, Any]) -> None:
        """Add to what is about to be logged, which stays as it is."""
        step = self._trainer.state.global_step
        if "loss" in logs:
            for name, value in self.meter.read(step).items():
                logs.setdefault(name, value)
        for line in self._watch.see({**logs, "step": step}) if self._watch is not None else ():
            _say(self._trainer, line)

    def end(self) -> None:
        """The summary and the picture."""
        state = self._trainer.state
        history = History(state.log_history, state.max_steps, state.global_step)
        if self._trainer.is_world_process_zero() and history.series("loss"):
            _say(self._trainer, "\n".join(lines(history)))
        if self._trainer.is_world_process_zero() and len(history.series("loss")) > 1:
            _say(self._trainer, draw(history, Path(self._trainer.args.output_dir)))


# Of the trainers that train now, by identity, since a trainer may define equality.
_runs: dict[int, _Run] = {}


def _say(trainer: Any, text: str) -> None:
    if trainer.is_world_process_zero():
        say(text)


def _guarded(trainer: Any, act: Callable[[], Any]) -> None:
    """Do something of ours, whose failure is told and ends the measuring, but not somebody's training."""
    try:
        act()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is printed
        _runs.pop(id(trainer), None)
        _say(trainer, f"training statistics end here, since they failed: {type(error).__name__}: {error}")


def measured(trainer: type) -> dict[str, Method]:
    """Methods of a trainer's class with statistics around them."""
    wraps: dict[str, Wrap] = {
        "_inner_training_loop": _training,
        "get_batch_samples": _before(lambda run, *args: run.fetch()),
        # Trainer asks for it after each micro-batch.
        "floating_point_ops": _before(lambda run, inputs, *args: run.batch(inputs)),
        "log": _before(lambda run, logs, *args: run.log(logs)),
        "evaluate": _paused,
        "predict": _paused,
        "_save_checkpoint": _paused,
    }
    phases = in_phases(trainer)
    if phases:
        wraps["compute_loss"] = _before(lambda run, model, inputs, *args, **kwargs: run.compute(inputs))
        wraps |= {name: _timed(phase) for name, phase in phases.items()}
    return {name: wrap(getattr(trainer, name)) for name, wrap in wraps.items() if hasattr(trainer, name)}


def _training(original: Method) -> Method:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        _guarded(self, lambda: _runs.update({id(self): _Run(self)}))
        try:
            with _timed_sync(self):
                result = original(self, *args, **kwargs)
            run = _runs.get(id(self))
            if run is not None:
                _guarded(self, run.end)
            return result
        finally:
            _runs.pop(id(self), None)

    return method


def _before(act: Callable[..., Any]) -> Wrap:
    """`act(run, *arguments)` before a method, while its trainer trains."""

    def wrap(original: Method) -> Method:
        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            run = _runs.get(id(self))
            if run is not None:
                _guarded(self, lambda: act(run, *args, **kwargs))
            return original(self, *args, **kwargs)

        return method

    return wrap


def _paused(original: Method) -> Method:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = _runs.get(id(self))
        with nullcontext() if run is None else run.meter.paused():
            return original(self, *args, **kwargs)

    return method


def _timed(phase: str) -> Wrap:
    """A method whose time is that of a phase, while its trainer trains."""

    def wrap(original: Method) -> Method:
        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _in_phase(self, phase, functools.partial(original, self, *args, **kwargs))

        return method

    return wrap


def _in_phase(trainer: Any, phase: str, call: Callable[[], Any]) -> Any:
    """What a call returns, which is timed as a phase of the trainer's."""
    run = _runs.get(id(trainer))
    if run is None or run.meter.is_paused or not is_phase(phase):
        return call()
    _guarded(trainer, lambda: run.meter.phases.enter(phase))
    try:
        result = call()
        if phase == "rollout" and _runs.get(id(trainer)) is run:
            _guarded(trainer, lambda: run.meter.sampled(result))
        return result
    finally:
        if _runs.get(id(trainer)) is run:
            _guarded(trainer, run.meter.phases.leave)


@contextmanager
def _timed_sync(trainer: Any) -> Iterator[None]:
    """While a trainer trains, what its object for vLLM does to give it weights is a phase too."""
    attribute, name = SYNC
    owner = getattr(trainer, attribute, None)
    original = getattr(owner, name, None)
    if original is None or name in vars(owner):
        yield
        return

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        return _in_phase(trainer, "sync", functools.partial(original, *args, **kwargs))

    # On the instance, so that its class and whoever has patched that stay as they are.
    setattr(owner, name, timed)
    try:
        yield
    finally:
        delattr(owner, name)

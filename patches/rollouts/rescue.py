"""A failure in the middle of training with rollouts: what failed in one line, and a checkpoint of what there was.

A step fails before anything of it is in the weights: while completions are sampled, scored or learned from. So the
state after the step before is whole, and is saved as Trainer saves it. Other processes may be gone by then, so it is
saved only where one process can do that alone.
"""

import functools
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..trainers.scope import Method, within

_logger = logging.getLogger("sloth_plugins")


class RolloutError(RuntimeError):
    """What is wrong with rollouts through vLLM, and what to do; what was raised there is its cause."""


class _Terminated(SystemExit):
    """Another process has died and the launcher ends this one."""


def told(generation: type) -> dict[str, Method]:
    """TRL's rollouts, whose failures are one line each."""
    kind: Any = generation
    return {
        "_init_vllm": _told(kind._init_vllm, _start_failure),
        "sync_weights": _told(kind.sync_weights, _failure),
        "generate": _told(kind.generate, _failure),
    }


def _told(original: Method, explain: Any) -> Method:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except RolloutError:
            raise
        except Exception as error:
            text = explain(self, error)
            if text is None:
                raise
            raise RolloutError(text) from error

    return method


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _start_failure(generation: Any, error: Exception) -> str | None:
    said = str(error).lower()
    if isinstance(error, ImportError):
        return f"rollouts through vLLM were asked for, and it cannot be imported: {_first_line(error)}"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "memory" in said:
        return (
            f"vLLM does not fit beside the trainer's model: {_first_line(error)}; it was given "
            f"vllm_gpu_memory_utilization={generation.gpu_memory_utilization} and vllm_max_model_length="
            f"{generation.max_model_length}, of which smaller ones take less"
        )
    return _failure(generation, error)


def _failure(generation: Any, error: Exception) -> str | None:
    client = getattr(generation, "vllm_client", None)
    # That of requests, too, is one of Python's.
    if client is not None and isinstance(error, OSError):
        return f"the vLLM server at {client.base_url} cannot be reached any more ({type(error).__name__})"
    return None


def rescued(trainer: type) -> dict[str, Method]:
    """A trainer whose state is saved when a step fails, or when it is told to end."""
    kind: Any = trainer
    return {"training_step": _training_step(kind.training_step), **within(trainer, _ended, "_inner_training_loop")}


def _training_step(original: Method) -> Method:
    @functools.wraps(original)
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except (Exception, _Terminated) as error:
            _logger.error("sloth-plugins: %s: %s", _first_line(error), _save(self, error))
            raise

    return training_step


def _save(trainer: Any, error: BaseException) -> str:
    """Save a trainer's state, and say where, or why not."""
    step = int(trainer.state.global_step)
    if step == 0:
        return "nothing was trained yet"
    if not trainer.args.should_save:
        return f"the process of rank 0 saves the state after step {step}"
    kind = str(trainer.accelerator.distributed_type).rpartition(".")[2]
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        return f"the state after step {step} is not saved, since weights are sharded ({kind})"
    place = Path(trainer._get_output_dir(trial=None)) / f"checkpoint-{step}"
    if not (place / "trainer_state.json").is_file():
        try:
            # Its flops are summed up over processes that may be gone.
            with replaced_in(trainer, store_flos=lambda: None):
                trainer._save_checkpoint(trainer.model, None)
        except Exception as failure:  # noqa: BLE001 - the first error is the one to be seen; this one is printed with it
            return f"the state after step {step} cannot be saved ({type(failure).__name__}: {_first_line(failure)})"
    return f"the state after step {step} is in {place}, from which resume_from_checkpoint goes on"


@contextmanager
def replaced_in(instance: Any, **members: Any) -> Iterator[None]:
    """Within it, an object has members of its own instead of its class's."""
    vars(instance).update(members)
    try:
        yield
    finally:
        for name in members:
            vars(instance).pop(name, None)


@contextmanager
def _ended(trainer: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """While a trainer trains, a launcher that ends this process is heard: it does so where another one has died."""
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def terminated(number: int, frame: Any) -> None:
        raise _Terminated(128 + number)

    signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

"""Where the time of a step goes in a trainer that samples what it trains on: phases, each some methods of TRL's.

A method that a version of TRL does not have is not timed, and a phase without any is not logged. A phase within another
takes its time from that: each moment is the innermost one's, so they never add up to more than the step.
"""

import time
from collections import deque
from typing import Any

import torch

from .history import PHASES

METHODS = {
    # Sampling, and making a batch of it.
    "rollout": ("_generate_and_score_completions", "_generate", "_generate_vllm", "_generate_completions"),
    # Where the trainer does it itself; newer ones have an object for vLLM, see SYNC.
    "sync": ("_move_model_to_vllm",),
    # Of the reference model and the old policy. With gradients they are the loss's.
    "reference": ("_get_per_token_logps_and_entropies", "_forward"),
    "reward": ("_calculate_rewards", "_calculate_rewards_from_functions", "_compute_rewards"),
    # Forward and backward, as all else in it is another phase.
    "loss": ("training_step",),
}
SYNC = ("vllm_generation", "sync_weights")
"""The trainer's attribute and its method that gives vLLM the weights."""
_REST = ""
"""What is no phase."""
Moment = Any
"""Seconds on a CPU; on a GPU an event on the stream, as the host is ahead of the device."""


def in_phases(trainer: type) -> dict[str, str]:
    """The phase of each method of a trainer's class that is one; nothing for a trainer that does not sample."""
    if not any(hasattr(trainer, name) for name in METHODS["rollout"]):
        return {}
    return {name: phase for phase, names in METHODS.items() for name in names if hasattr(trainer, name)}


def is_phase(phase: str) -> bool:
    """Whether a method is in its phase when it is called now."""
    return phase != "reference" or not torch.is_grad_enabled()


class Phases:
    """The seconds of each phase, on one device. Only `read` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[str] = []
        self._marks: deque[tuple[str, Moment]] = deque()
        """What began, and when; the last goes on."""
        self._sums: dict[str, float] = {}

    def enter(self, phase: str = _REST) -> None:
        """A phase begins, and the one around it pauses."""
        self._open.append(phase)
        self._mark()

    def leave(self) -> None:
        """The latest phase ends, and the one around it goes on."""
        self._open.pop()
        self._mark()

    def read(self) -> dict[str, float]:
        """Seconds of each phase that there was since the last call."""
        if self._marks:
            self._mark()
            if self._device.type == "cuda":
                self._marks[-1][1].synchronize()
            self._settle()
        found = {phase: self._sums[phase] for phase in PHASES if phase in self._sums}
        self._sums = {}
        return found

    def _mark(self) -> None:
        self._marks.append((self._open[-1] if self._open else _REST, self._now()))
        self._settle()

    def _now(self) -> Moment:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch has no types there
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _settle(self) -> None:
        """Add up what the device is done with, so that a run that logs nothing keeps nothing."""
        while len(self._marks) > 1 and (self._device.type != "cuda" or self._marks[1][1].query()):
            phase, began = self._marks.popleft()
            ended = self._marks[0][1]
            seconds = began.elapsed_time(ended) / 1000 if self._device.type == "cuda" else ended - began
            self._sums[phase] = self._sums.get(phase, 0.0) + seconds

"""Plain MLP forwards: an activation between two projections, which are called as modules."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..blocks.activation import activation_of
from ..kernels import ops

Forward = Callable[..., torch.Tensor]


def plain(original: Forward) -> Forward:
    """`fc2(activation_fn(fc1(x)))`, as in Phi; an activation unknown to the ops, or with hooks, runs as upstream's."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():  # first, since Dynamo cannot trace the questions below
            return original(self, hidden_states)
        activation = activation_of(self.activation_fn)
        if activation is None:
            return original(self, hidden_states)
        hidden = self.fc1(hidden_states)
        if ops.supports_activate(hidden):
            hidden = ops.activate(hidden, activation)
        else:
            hidden = self.activation_fn(hidden)
        out: torch.Tensor = self.fc2(hidden)
        return out

    return forward

"""Gated MLP forwards: an activation of one projection of the input, times another projection, projected down.

The projections are called as modules, so LoRA, 4-bit layers and hooks on them work as before. An activation that the
ops do not know, or one with hooks, takes upstream's path.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..blocks.activation import activation_of
from ..kernels import ops

Forward = Callable[..., torch.Tensor]


def gated(original: Forward) -> Forward:
    """`down_proj(act_fn(gate_proj(x)) * up_proj(x))`, as in Llama and Gemma."""

    @functools.wraps(original)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():  # first, since Dynamo cannot trace the questions below
            return original(self, x)
        activation = activation_of(self.act_fn)
        if activation is None:
            return original(self, x)
        gate = self.gate_proj(x)
        up = self.up_proj(x)
        if ops.supports_glu(gate, up):
            hidden = ops.glu(gate, up, activation)
        else:
            hidden = self.act_fn(gate) * up
        down: torch.Tensor = self.down_proj(hidden)
        return down

    return forward


def gated_fused(original: Forward) -> Forward:
    """`down_proj(up * activation_fn(gate))` with both from one `gate_up_proj(x)`, gate first, as in Phi-3."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return original(self, hidden_states)
        activation = activation_of(self.activation_fn)
        if activation is None:
            return original(self, hidden_states)
        gate_up = self.gate_up_proj(hidden_states)
        if ops.supports_glu_fused(gate_up):
            hidden = ops.glu_fused(gate_up, activation)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            hidden = up * self.activation_fn(gate)
        down: torch.Tensor = self.down_proj(hidden)
        return down

    return forward

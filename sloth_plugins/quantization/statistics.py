"""What one pass forward and back tells of a linear layer, and every score that is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .packing import Packing


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A name with what it measures, in one line."""

    name: str
    what: str
    in_nats: bool = False
    """Whether it estimates the KL divergence, in nats a token, that quantising this layer alone costs."""


# W: the weight. D: what quantisation changes in it. x: the input. g: the gradient of a sampled log-likelihood by the
# output.
SCORES = (
    Score(
        name="fisher", what="half the mean of (g D x)^2: the Fisher information along D, token by token", in_nats=True
    ),
    Score(name="sequence", what="the same with g D x summed over each sequence first", in_nats=True),
    Score(name="diagonal", what="half the sum of D^2 E[x^2] E[g^2]: the Fisher diagonal, factored", in_nats=True),
    Score(name="activation", what="sum of D^2 E[x^2]: the squared error of the output"),
    Score(name="weight", what="sum of D^2"),
    Score(name="relative", what="norm of D over norm of W"),
)


class Meter:
    """Watches one linear layer through passes forward and back over rows of tokens."""

    def __init__(self, linear: nn.Linear, packing: Packing) -> None:
        weight = linear.weight.detach()
        packed = packing.pack(weight)
        self.packed_bytes, self.plain_bytes = packed.bytes, packing.plain_bytes(weight)
        self._error = packed.dequantised(weight).sub_(weight)
        self._relative = float(self._error.float().norm() / weight.float().norm().clamp_min(1e-30))
        rows, columns = weight.shape
        self.inputs = weight.new_zeros(columns, dtype=torch.float32)
        """Sum of x^2 of each input."""
        self.largest = weight.new_zeros(columns, dtype=torch.float32)
        """Largest |x| of each input."""
        self._gradients = weight.new_zeros(rows, dtype=torch.float32)
        self._tokens = 0
        self._by_token = self._by_sequence = weight.new_zeros((), dtype=torch.float64)
        self._handle = linear.register_forward_hook(self._forward)

    def close(self) -> None:
        """Watch no longer."""
        self._handle.remove()

    def _forward(self, module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        x = args[0].detach()
        if out.requires_grad:
            out.register_hook(lambda grad: self._backward(x, grad))  # type: ignore[no-untyped-call]  # untyped in torch

    def _backward(self, x: torch.Tensor, grad: torch.Tensor) -> None:
        x, grad = x.reshape(-1, *x.shape[-2:]), grad.reshape(-1, *grad.shape[-2:])
        flat, slopes = x.flatten(0, -2), grad.flatten(0, -2)
        self.inputs += flat.float().square().sum(0)
        self.largest = torch.maximum(self.largest, flat.abs().amax(0).float())
        self._gradients += slopes.float().square().sum(0)
        self._tokens += flat.shape[0]
        change = nn.functional.linear(x, self._error)
        products = (grad.float() * change.float()).sum(-1).double()
        self._by_token = self._by_token + products.square().sum()
        self._by_sequence = self._by_sequence + products.sum(-1).square().sum()

    def scores(self) -> dict[str, float]:
        """All of SCORES."""
        count = max(1, self._tokens)
        squared = self._error.float().square_()
        by_input = squared @ self.inputs  # for each output
        return {
            "fisher": float(self._by_token) / 2 / count,
            "sequence": float(self._by_sequence) / 2 / count,
            "diagonal": float(by_input.double() @ self._gradients.double()) / 2 / count**2,
            "activation": float(by_input.sum()) / count,
            "weight": float(squared.sum()),
            "relative": self._relative,
        }

    def facts(self, count: int) -> dict[str, Any]:
        """Scores, bytes and outliers after `count` tokens, as JSON takes them."""
        typical = (self.inputs / count).sqrt().median().clamp_min(1e-30)
        largest, channel = self.largest.max(0)
        return {
            "scores": self.scores(),
            "plain_bytes": self.plain_bytes,
            "packed_bytes": self.packed_bytes,
            "largest": float(largest),
            "channel": int(channel),
            "ratio": float(largest / typical),
        }

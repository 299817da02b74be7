"""Log-probabilities of rows of projections, in place: what the losses do to a chunk of logits that they have made.

No autograd here: `patches/losses` has the chunks, the products around them, and the graph.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .common import implementation_beside

OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass(frozen=True, slots=True)
class LogitShape:
    """How logits z come from projections y: post * pre * y, or, softcapped, post * cap * tanh(pre * y / cap).

    `pre` is the logit scale of Cohere or Granite, `cap` the softcap of Gemma 2, `post` an inverse temperature.
    """

    pre: float = 1.0
    cap: float | None = None
    post: float = 1.0


@dataclass(slots=True)
class RowStatistics:
    """What is found of each row of z, with p = softmax(z): tensors [n], None for what was not asked for.

    `log_probs` is (1 - e) * log p_target + e * mean(log p) for label smoothing e, `entropy` -sum(p log p),
    `log_sum_sq_probs` log(sum(p^2)), `mean_logits` mean(z), `is_top1` (bool) whether the target is the first argmax.
    """

    log_probs: torch.Tensor
    log_sum_exp: torch.Tensor
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None

    @classmethod
    def empty(cls, n: int, outputs: tuple[str, ...], like: torch.Tensor, dtype: torch.dtype) -> "RowStatistics":
        """Room for n rows. Raises ValueError for an output that is not one of `OPTIONAL`."""
        for name in outputs:
            if name not in OPTIONAL:
                raise ValueError(f"unknown output {name!r}; known are {', '.join(OPTIONAL)}")
        room = {
            name: torch.empty(n, dtype=torch.bool if name == "is_top1" else dtype, device=like.device)
            for name in ("log_probs", "log_sum_exp", *outputs)
        }
        return cls(**room)

    def rows(self, chunk: slice) -> "RowStatistics":
        """The same memory for some of the rows."""
        optional = {name: None if (t := getattr(self, name)) is None else t[chunk] for name in OPTIONAL}
        return RowStatistics(self.log_probs[chunk], self.log_sum_exp[chunk], **optional)


def rows_implementation(y: torch.Tensor) -> Any:
    """The module whose `log_probs` and `log_probs_gradient` run on y; the torch reference where Triton cannot."""
    return implementation_beside("reference", "vocab_rows", y)

"""The one tolerance of the kernel tests: four times the error torch's own ops make in the same dtype.

Both errors are taken against the same computation in float64. In Triton's interpreter twice that is allowed to bf16,
because it truncates where hardware rounds.
"""

import os
from collections.abc import Callable, Sequence

import torch

FACTOR = 4.0
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

Op = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def wide(rows: int, cols: int, dtype: torch.dtype, extra: int = 3) -> torch.Tensor:
    """A view of unit stride in a row, with other memory between its rows."""
    return torch.randn(rows, cols + extra).to(dtype)[:, :cols]


def assert_accurate(
    name: str, ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, cancelling: float = 0.0
) -> None:
    """`ours` against `truth` (float64), as near as `plain` is: largest error and norm of the error.

    `cancelling` is the size of fp32 terms that cancel in the result: their rounding stays, by luck less in one order.
    """
    assert ours.dtype is plain.dtype, f"{name}: dtype {ours.dtype}, torch gives {plain.dtype}"
    assert ours.shape == plain.shape, f"{name}: shape {tuple(ours.shape)}, torch gives {tuple(plain.shape)}"
    assert torch.isfinite(ours).all(), f"{name}: {int((~torch.isfinite(ours)).sum())} values are not finite"
    factor = FACTOR * (2 if INTERPRETED and ours.dtype is torch.bfloat16 else 1)
    eps = torch.finfo(ours.dtype).eps
    ours_error, plain_error = ours.double() - truth, plain.double() - truth
    scale = truth.abs().max()
    rest = cancelling * torch.finfo(torch.float32).eps
    for what, got, own, floor in (
        ("largest error", ours_error.abs().max(), plain_error.abs().max(), eps * scale + rest),
        ("error norm", ours_error.norm(), plain_error.norm(), eps * max(truth.norm() / 4, scale) + rest),
    ):
        limit = factor * own + floor
        assert got <= limit, f"{name}: {what} {got:.3e} > {limit:.3e} = {factor:g} * torch's {own:.3e} + {floor:.3e}"


def check(
    ours: Op,
    plain: Op,
    inputs: Sequence[torch.Tensor],
    needs_grad: Sequence[bool] | None = None,
    outgoing: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
    cancelling: float = 0.0,
) -> None:
    """Compare values and gradients of `ours` with `plain`, which also gives the truth on float64 copies of the inputs.

    Views are taken inside the two functions, so that inputs are leaves. `outgoing` makes the gradient of an output.
    """
    flags = list(needs_grad or [True] * len(inputs))

    def run(op: Op, dtype: torch.dtype | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        leaves = [
            t.detach().to(dtype or t.dtype, copy=True).requires_grad_(flag)
            for t, flag in zip(inputs, flags, strict=True)
        ]
        result = op(*leaves)
        outputs = list(result) if isinstance(result, tuple) else [result]
        if any(flags):
            if not grads:
                grads.extend(outgoing(o.detach()) for o in outputs)
            sent = [g.to(o.dtype) if g.dtype is not o.dtype else g for g, o in zip(grads, outputs, strict=True)]
            used = [i for i, o in enumerate(outputs) if o.requires_grad]
            torch.autograd.backward([outputs[i] for i in used], [sent[i] for i in used])
        return [o.detach() for o in outputs], [leaf.grad for leaf in leaves if leaf.grad is not None]

    grads: list[torch.Tensor] = []
    got, got_grads = run(ours, None)
    own, own_grads = run(plain, None)
    truth, truth_grads = run(plain, torch.float64)
    assert len(got_grads) == len(own_grads) == sum(flags), "a gradient is missing or was not asked for"
    for i, values in enumerate(zip(got, own, truth, strict=True)):
        assert_accurate(f"output {i}", *values)
    for i, values in enumerate(zip(got_grads, own_grads, truth_grads, strict=True)):
        assert_accurate(f"gradient {i}", *values, cancelling)

"""The MLP block: norm, gate and up, activation, down, and the residual around them."""

from typing import Any

import torch

from ..kernels.once import differentiable_once
from ..kernels.ops.block_norm import norm_rows_backward
from ..kernels.ops.common import kernels_for
from ..kernels.ops.lora_glu import LowRank, Sums, lora_glu, lora_glu_backward
from ..kernels.ownership import exclusively_owned, graph_is_kept
from . import attention_block
from .edges import enter, leave, leave_backward
from .policy import Policy
from .run import Parts, Run, rows, stash, unstash

Tensor = torch.Tensor


def gate_and_up(parts: Parts, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Both [T, f] as views of what the projections gave, separate or as one."""
    if len(outputs) == 1:
        gate, up = outputs[0][:, : parts.up.n].chunk(2, dim=-1)
        return gate, up
    return outputs[0], outputs[1]


def _terms(run: Run, made: dict[str, Any]) -> tuple[LowRank | None, LowRank | None]:
    """The low-rank terms that gate and up do not have yet."""
    terms = run.parts.up.terms(made["xa"]) if _adds_late(run) else [None, None]
    if len(terms) == 1:
        (term,) = terms
        if term is None:
            return None, None
        gate, up = term.b.chunk(2)
        return LowRank(term.x, gate), LowRank(term.x, up)
    return terms[0], terms[1]


def _adds_late(run: Run) -> bool:
    """Whether the activation adds the adapters of gate and up, which otherwise their products do."""
    return run.parts.is_gated and run.parts.up.is_narrow


def _activate(run: Run, made: dict[str, Any]) -> Tensor:
    outputs: list[Tensor] = made["outputs"]
    if not run.parts.is_gated:
        activated: Tensor = kernels_for("activation", outputs[0]).activate_fwd(outputs[0], run.parts.activation)
        return activated
    pair, terms = gate_and_up(run.parts, outputs), _terms(run, made)
    hidden = torch.empty(pair[0].shape, dtype=pair[0].dtype, device=pair[0].device)
    lora_glu(*pair, *terms, run.parts.activation, hidden)
    return hidden


def _activate_backward(
    run: Run,
    made: dict[str, Any],
    dhidden: Tensor,
    term: LowRank | None,
    *,
    overwrite: bool,
    sum_up: bool,
    sum_down: bool,
) -> tuple[list[Tensor], Sums]:
    """(gradients of gate and up for dhidden + term, in their memory if `overwrite`; gradients of b on the way).

    Without `sum_down` dhidden becomes act(gate) * up.
    """
    outputs: list[Tensor] = made["outputs"]
    grads = outputs if overwrite else [torch.empty_like(t) for t in outputs]
    sums: Sums = None, None, None
    if run.parts.is_gated:
        args = *gate_and_up(run.parts, outputs), *gate_and_up(run.parts, grads), run.parts.activation
        sums = lora_glu_backward(dhidden, term, *args, *_terms(run, made), sum_up=sum_up, sum_down=sum_down)
    else:
        kernels_for("activation", dhidden).activate_bwd(dhidden, outputs[0], grads[0], run.parts.activation, True)
    return grads, sums


def _grads_of_b(run: Run, sums: Sums) -> list[Tensor | None] | None:
    """Of each projection of gate and up, as far as the activation summed them."""
    if len(run.parts.up.projections) == 2:
        return list(sums[:2])
    found = [t for t in sums[:2] if t is not None]
    return [torch.cat(found)] if found else None


def _up(run: Run, mid: Tensor, kept: dict[str, Any]) -> dict[str, Any]:
    """The norm's statistics, and the outputs of gate and up."""
    parts = run.parts
    # With room behind them for what the backward puts beside their gradients.
    out = parts.up.new_outputs(mid.shape[0], mid.device) if parts.is_gated and parts.up.room else None
    made, outputs = enter(
        parts.up, parts.mlp_norm, mid, run.seeds["up"], kept, with_adapters=not _adds_late(run), out=out
    )
    return {**made, "outputs": outputs}


def forward(run: Run, mid: Tensor, residual: Tensor) -> tuple[dict[str, Any], Tensor]:
    """(what the backward needs, the block's output [T, h]) for the norm's input and what is added, both [T, h]."""
    parts = run.parts
    made = _up(run, mid, {})
    hidden = _activate(run, made)
    made["xa_down"] = parts.down.low_rank(hidden, run.seeds["down"])
    left, out = leave(parts.down, hidden, made["xa_down"], parts.mlp_output_norm, residual)
    return made | left, out.add_(mid) if parts.is_parallel else out


def backward(
    run: Run,
    mid: Tensor,
    made: dict[str, Any],
    total: Tensor,
    needs: list[bool],
    *,
    need_dx: bool,
    overwrite: bool,
    in_place: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(gradient of the norm's input, with the residual's unless parallel; gradients of the adapters of up and down).

    The first is [B, S, h] as the gradient `total` of the block's output, and `in_place` is written where that lies.
    """
    parts, grad = run.parts, rows(total)
    n_needs = len(parts.up.parameters())
    dout = leave_backward(parts.down, parts.mlp_output_norm, made, grad)
    dyb = parts.down.low_rank_grad([dout])
    adds_late = parts.is_gated and parts.down.is_narrow and not parts.down.has_dropout
    dhidden = parts.down.input_grad([dout], dyb, run.seeds["down"], with_adapters=not adds_late)
    a = parts.down.a
    term = LowRank(dyb, a.t()) if adds_late and dyb is not None and a is not None else None
    # A and B of each projection in turn.
    sum_up, sum_down = any(needs[1:n_needs:2]), term is not None and needs[n_needs]
    dups, sums = _activate_backward(run, made, dhidden, term, overwrite=overwrite, sum_up=sum_up, sum_down=sum_down)
    grads_down = parts.down.adapter_grads(
        [dout], dyb, dhidden, made["xa_down"], run.seeds["down"], needs[n_needs:], da=sums[2]
    )
    del dhidden, dout
    dyb = parts.up.low_rank_grad(dups)
    dn = parts.up.input_grad(dups, dyb, run.seeds["up"])
    dx = None
    if need_dx:
        dx = total if in_place else torch.empty(total.shape, dtype=mid.dtype, device=mid.device)
    norm_rows_backward(
        dn, mid, parts.mlp_norm, made["stats"],
        dx=None if dx is None else rows(dx), residual_grad=None if parts.is_parallel else grad,
        restore=any(needs[:n_needs]),
    )  # fmt: skip
    grads_up = parts.up.adapter_grads(
        dups, dyb, dn, made["xa"], run.seeds["up"], needs[:n_needs], dbs=_grads_of_b(run, sums)
    )
    return dx, grads_up + grads_down


class MLPBlock(torch.autograd.Function):
    """mid plus the MLP of its norm; in a parallel layer, x plus mid plus the MLP of the norm of x, the layer's input.

    x and mid [B, S, h]; `params` are those of the adapters of gate, up and down, in order.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, x: Tensor, mid: Tensor, *params: Tensor) -> Tensor:
        """The layer's output [B, S, h]."""
        source = x if run.parts.is_parallel else mid
        made, out = forward(run, rows(source), rows(mid))
        ctx.run = run
        outputs = made.pop("outputs")
        if run.is_differentiable and any(ctx.needs_input_grad):
            if run.policy is Policy.KEEP:
                stash(ctx, {**made, **{f"output{i}": t for i, t in enumerate(outputs)}}, source, *params)
            elif run.parked is not None:
                stash(ctx, made, *params)
            else:
                stash(ctx, made, x, *params)
        return out.view(x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of x (in a parallel layer), of mid and of the adapters."""
        run: Run = ctx.run
        parts = run.parts
        repeatable = graph_is_kept()
        inputs, made = unstash(ctx, len(ctx.needs_input_grad) - 2 - (run.parked is not None))
        source = inputs[0] if run.parked is None else attention_block.fetch(run, keep=repeatable)
        # Where the gradient lies that comes in, there is room for the one that goes out.
        fits = not parts.is_parallel and grad.dtype is source.dtype and grad.is_contiguous()
        in_place = fits and exclusively_owned(grad, "incoming")
        overwrite = run.may_overwrite and not repeatable
        if run.policy is Policy.KEEP:
            made["outputs"] = [made[name] for name in ("output0", "output1") if name in made]
            mid = rows(source)
        else:
            mid, overwrite = rows(source), True
            with run.measured("again"):
                if not parts.is_parallel:
                    run.recomputed, mid = attention_block.forward(run, source, differentiable=True)
                made |= _up(run, mid, made)
        need_x, need_mid = ctx.needs_input_grad[1:3]
        dx, grads = backward(
            run, mid, made, grad, list(ctx.needs_input_grad[3:]), need_dx=need_x if parts.is_parallel else need_mid,
            overwrite=overwrite, in_place=in_place,
        )  # fmt: skip
        return None, *((dx, grad) if parts.is_parallel else (None, dx)), *grads

"""The attention block: norm, q, k and v, rotary embedding, attention, o, and the residual around them."""

import dataclasses
from typing import Any

import torch

from ..kernels.once import differentiable_once
from ..kernels.ops.block_norm import norm_rows_backward
from ..kernels.ops.common import kernels_for
from ..kernels.ops.lora_rope import lora_rope, supports_lora_rope
from ..kernels.ownership import exclusively_owned, graph_is_kept
from .attention import State, attend, attend_backward
from .edges import enter, leave, leave_backward
from .policy import Policy
from .run import Host, Parts, Run, rows, stash, unstash

Tensor = torch.Tensor


def split_heads(parts: Parts, outputs: list[Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, S, H, D], k and v [B, S, Hk, D] as views of what the projections gave, separate or as one."""
    n_q, n_k, dim = parts.heads
    if len(outputs) == 1:
        q, k, v = torch.split(outputs[0][:, : parts.qkv.n], [n_q * dim, n_k * dim, n_k * dim], dim=-1)
    else:
        q, k, v = outputs
    return q.view(*shape, n_q, dim), k.view(*shape, n_k, dim), v.view(*shape, n_k, dim)


def rotate(parts: Parts, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, made: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """q and k as the attention takes them; in place, unless their norms need them as they were."""
    norms = parts.qk_norms
    if norms is None:
        rotated: tuple[Tensor, Tensor] = kernels_for("rope", q, k).rope_fwd(q, k, cos, sin, 2, True, True)
        return rotated
    q_norm, k_norm = norms
    q_out, k_out, made["q_rstd"], made["k_rstd"] = kernels_for("qk_norm_rope", q, k).qk_norm_rope_fwd(
        q, k, q_norm.weight, k_norm.weight, cos, sin,
        q_norm.eps, k_norm.eps, q_norm.offset, q_norm.cast_before_weight, 2, True,
    )  # fmt: skip
    return q_out, k_out


def _adds_late(run: Run) -> bool:
    """Whether the adapters of q, k and v are added where q and k are rotated, which otherwise their products do."""
    group = run.parts.qkv
    # One term for outputs that lie beside each other has to be one piece, or three of a size.
    fits = group.is_even or (group.r > 0 and not group.gives_one)
    if not fits or run.parts.qk_norms is not None or not group.is_narrow:
        return False
    return supports_lora_rope(run.cos, run.sin, run.parts.heads[2])


def _add_and_rotate(run: Run, outputs: list[Tensor], xa: Tensor | None) -> None:
    """Add the low-rank terms of q, k and v to their products, and turn q and k, where they lie."""
    group = run.parts.qkv
    n_q, n_k, _ = run.parts.heads
    if group.gives_one:
        separate = len(group.projections) == 3
        lora_rope(outputs[0], group.whole_term(xa), run.cos, run.sin, (n_q, n_k, n_k), separate=separate)
        return
    terms = group.terms(xa)
    for y, term, heads in zip(outputs[:2], terms[:2], ((n_q, 0, 0), (0, n_k, 0)), strict=True):
        lora_rope(y, term, run.cos, run.sin, heads)
    if terms[2] is not None:
        outputs[2].addmm_(terms[2].x, terms[2].b.t())


def _unrotate(run: Run, made: dict[str, Any], dq: Tensor, dk: Tensor, to: tuple[Tensor, Tensor]) -> None:
    """Gradients of q and k before the rotation (and their norms), written into `to`."""
    norms = run.parts.qk_norms
    if norms is None:
        kernels_for("rope", dq, dk).rope_bwd(dq, dk, run.cos, run.sin, 2, *to)
        return
    q_norm, k_norm = norms
    kernels_for("qk_norm_rope", dq, dk).qk_norm_rope_bwd(
        dq, dk, made["raw_q"], made["raw_k"], q_norm.weight, k_norm.weight, run.cos, run.sin,
        made["q_rstd"], made["k_rstd"], q_norm.offset, q_norm.cast_before_weight, 2, *to, False, False,
    )  # fmt: skip


def forward(run: Run, x: Tensor, *, differentiable: bool) -> tuple[dict[str, Any], Tensor]:
    """(what the backward needs, the block's output [T, h]) for the layer's input x [B, S, h]; see `AttentionBlock`.

    What `run.kept` has of an earlier forward is not computed again.
    """
    parts, flat, kept = run.parts, rows(x), run.kept
    shape = (x.shape[0], x.shape[1])
    late = _adds_late(run)
    made, outputs = enter(parts.qkv, parts.attention_norm, flat, run.seeds["qkv"], kept, with_adapters=not late)
    if late:
        _add_and_rotate(run, outputs, made["xa"])
    q, k, v = split_heads(parts, outputs, shape)
    if parts.qk_norms is not None:
        made["raw_q"], made["raw_k"] = q, k
    if not late:
        q, k = rotate(parts, run.cos, run.sin, q, k, made)
    if run.cache is not None:
        _fill(run, k, v)
    state: State | None = kept.get("state")
    if state is None:
        with run.measured("attention"):
            state = attend(run.attention, *(t.transpose(1, 2) for t in (q, k, v)), differentiable=differentiable)
        if run.meter is not None:
            run.meter.accounted(state.out, *(state.leaves or ()))
    made["state"] = state
    if state.leaves is None:
        made["v"] = v
        if parts.qk_norms is None:
            made["q"], made["k"] = q, k
    values = _values(state, flat.shape[0])
    made["xa_o"] = kept["xa_o"] if kept else parts.o.low_rank(values, run.seeds["o"])
    # The MLP of a parallel layer adds its residual: upstream rounds the sum of both blocks where it is still small.
    residual = None if parts.is_parallel else flat
    left, mid = leave(parts.o, values, made["xa_o"], parts.attention_output_norm, residual)
    return made | left, mid.to(x.dtype)


def _fill(run: Run, k: Tensor, v: Tensor) -> None:
    """Put k and v [B, S, Hk, D] into upstream's cache, where differentiating through them raises."""
    refuse = torch._C._functions.DelayedError(
        "the keys and values that a fused block leaves in a cache cannot be differentiated; "
        "exclude the patch: SLOTH_PLUGINS=...,-*:blocks",
        2,
    )
    with torch.enable_grad():
        given = (t.detach().transpose(1, 2).requires_grad_() for t in (k, v))
        run.cache.update(*refuse(*given), run.attention.module.layer_idx)
    run.cache = None


def _values(state: State, n_rows: int) -> Tensor:
    return state.out.detach().transpose(1, 2).reshape(n_rows, -1)


def backward(
    run: Run,
    x: Tensor,
    made: dict[str, Any],
    total: Tensor,
    needs: list[bool],
    *,
    need_dx: bool,
    in_place: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(gradient of x, gradients of the adapters of qkv and o) for the gradient `total` of the block's output.

    x and its gradient are [B, S, h]; `in_place` that is written where `total` lies.
    """
    parts, flat, grad = run.parts, rows(x), rows(total)
    n_needs = len(parts.qkv.parameters())
    dout = leave_backward(parts.o, parts.attention_output_norm, made, grad)
    state: State = made["state"]
    values = _values(state, flat.shape[0])
    dyb = parts.o.low_rank_grad([dout])
    grads_o = parts.o.adapter_grads([dout], dyb, values, made["xa_o"], run.seeds["o"], needs[n_needs:])
    dvalues = parts.o.input_grad([dout], dyb, run.seeds["o"])
    del dout, dyb
    dqkv = _attention_backward(run, made, state, dvalues.view(*x.shape[:2], -1, parts.heads[2]))
    dyb = parts.qkv.low_rank_grad(dqkv)
    if need_dx:
        dn = parts.qkv.input_grad(dqkv, dyb, run.seeds["qkv"])
        dx = total if in_place else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        norm_rows_backward(
            dn, flat, parts.attention_norm, made["stats"], dx=rows(dx), residual_grad=grad,
            restore=any(needs[:n_needs]),
        )  # fmt: skip
    else:
        dx, dn = None, torch.empty(flat.shape, dtype=run.dtype, device=flat.device)
        norm_rows_backward(dn, flat, parts.attention_norm, made["stats"], dx=None, restore=True)
    grads_qkv = parts.qkv.adapter_grads(dqkv, dyb, dn, made["xa"], run.seeds["qkv"], needs[:n_needs])
    return dx, grads_qkv + grads_o


def _attention_backward(run: Run, made: dict[str, Any], state: State, grad: Tensor) -> list[Tensor]:
    """Gradients [T, n] of what the projections of q, k and v gave, for that [B, S, H, D] of the values."""
    norms = run.parts.qk_norms
    if state.leaves is not None:
        q = k = v = None
    elif norms is None:
        q, k, v = made["q"], made["k"], made["v"]
    else:
        q, k = rotate(run.parts, run.cos, run.sin, made["raw_q"], made["raw_k"], made)
        v = made["v"]
    taken = [grad if t is None else t.transpose(1, 2) for t in (q, k, v)]
    dq, dk, dv = (
        t.transpose(1, 2)
        for t in attend_backward(run.attention, state, taken[0], taken[1], taken[2], grad.transpose(1, 2))
    )
    n_rows = grad.shape[0] * grad.shape[1]
    if run.parts.qkv.gives_one:
        joint = run.parts.qkv.new_outputs(n_rows, grad.device)
        to_q, to_k, to_v = split_heads(run.parts, [joint], (grad.shape[0], grad.shape[1]))
        _unrotate(run, made, dq, dk, (to_q, to_k))
        to_v.copy_(dv)
        return [joint]
    # The attention's gradients are nobody else's, so they are turned back where they lie.
    to = dq, dk
    if norms is not None and not (dq.is_contiguous() and dk.is_contiguous()):
        to = (
            torch.empty_like(dq, memory_format=torch.contiguous_format),
            torch.empty_like(dk, memory_format=torch.contiguous_format),
        )
    _unrotate(run, made, dq, dk, to)
    return [t.reshape(n_rows, -1) for t in (*to, dv)]


class AttentionBlock(torch.autograd.Function):
    """x [B, S, h] to x plus the attention of its norm, which in a parallel layer comes without x.

    `params` are those of the adapters of qkv and o, in order. The gradient of x is in both that of the sum.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, x: Tensor, *params: Tensor) -> Tensor:
        """The block's output [B, S, h]."""
        needs_graph = run.is_differentiable and any(ctx.needs_input_grad)
        keeps = run.policy is Policy.KEEP
        made, out = forward(run, x, differentiable=needs_graph and run.policy is not Policy.INPUT)
        ctx.run = run
        if needs_graph and not keeps:
            run.kept = {name: made[name] for name in ("xa", "xa_o")}
            if run.policy is Policy.ATTENTION:
                run.kept["state"] = made["state"]
        if needs_graph and not keeps and run.host is not None:
            _park(run, run.host, x)
            stash(ctx, {}, *params)
        elif needs_graph:
            stash(ctx, _flat(made) if keeps else {}, x, *params)
        return out.view(x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of x and of the adapters."""
        run: Run = ctx.run
        n_inputs = len(ctx.needs_input_grad) - 1
        inputs, made = unstash(ctx, n_inputs - (run.parked is not None))
        # Where it was parked, the MLP's backward, which comes first, has fetched it.
        x = inputs[0] if run.x is None else run.x
        repeatable = graph_is_kept()
        if run.policy is Policy.KEEP:
            made = _unflat(made)
        elif run.recomputed is not None:
            made = run.recomputed
        else:
            with run.measured("again"):
                made, _ = forward(run, x, differentiable=True)
        run.recomputed = None
        parked = run.parked
        if not repeatable:
            run.release()
            ctx.others = {}
        # Where the gradient lies that comes in, there is room for the one that goes out.
        fits = grad.dtype is x.dtype and grad.is_contiguous()
        in_place = fits and exclusively_owned(grad, "incoming")
        dx, grads = backward(
            run, x, made, grad, list(ctx.needs_input_grad[2:]), need_dx=ctx.needs_input_grad[1], in_place=in_place
        )
        if parked is not None:
            parked.leave()
        return None, dx, *grads


def _park(run: Run, host: Host, x: Tensor) -> None:
    """Put x, and the attention's output where it is kept, into host memory."""
    state: State | None = run.kept.get("state")
    if state is None or state.leaves is not None:
        run.parked = host.park([x])
    else:
        run.parked = host.park([x, state.out.transpose(1, 2)])
        state.out = state.out.new_empty(0)


def fetch(run: Run, *, keep: bool) -> Tensor:
    """x again, and the attention's output in its place; with `keep` they stay where they were, too."""
    assert run.parked is not None, "it was parked"
    run.x, *others = run.parked.take(keep=keep)
    if others:
        run.kept["state"] = dataclasses.replace(run.kept["state"], out=others[0].transpose(1, 2))
    return run.x


def _flat(made: dict[str, Any]) -> dict[str, Any]:
    """With the tensors of a kernel's state beside the others, so that they are saved as such."""
    state: State = made["state"]
    if state.leaves is not None:
        return made
    statistics = {f"statistic{i}": value for i, value in enumerate(state.statistics)}
    return {**{name: value for name, value in made.items() if name != "state"}, **statistics,
            "out": state.out, "backend": state.backend}  # fmt: skip


def _unflat(made: dict[str, Any]) -> dict[str, Any]:
    if "state" in made:
        return made
    statistics = tuple(made[f"statistic{i}"] for i in range(sum(name.startswith("statistic") for name in made)))
    return {**made, "state": State(made["out"], made["backend"], statistics)}

"""Every kernel once, forward and backward, against its reference: `python -m sloth_plugins.patches.kernels.selfcheck`.

Prints one JSON line for each kernel and dtype: the largest relative error, what is allowed, and the backend that ran.
On a machine without a CUDA device it is meant to be run with TRITON_INTERPRET=1.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator

import torch

from . import reference, reference_blocks, reference_four_bit
from .dispatch import backend_for
from .four_bit_weight import FourBit
from .ops import activate, apply_rotary, glu, glu_fused, layer_norm, qk_norm_rope, rms_norm
from .ops.activation import ACTIVATIONS
from .ops.block_norm import Norm
from .ops.common import implementation_beside
from .ops.copies import Copies
from .ops.four_bit import dequantize_four_bit
from .ops.lora_glu import LowRank
from .ops.vocab_rows import LogitShape, RowStatistics, rows_implementation

EPS = 1e-6
Tensors = list[torch.Tensor]
Check = Callable[[Callable[..., torch.Tensor]], tuple[Tensors, Tensors]]


def _rms_norm(draw: Callable[..., torch.Tensor]) -> tuple[Tensors, Tensors]:
    x, weight, dy = draw(3, 5, 100), draw(100), draw(3, 5, 100)
    y = rms_norm(x, weight, EPS)
    found = [y, *torch.autograd.grad(y, [x, weight], dy)]
    expected, rstd = reference.rms_norm_fwd(x, weight, EPS, 0.0, True)
    dx = torch.empty_like(x)
    dw = reference.rms_norm_bwd(dy, x, weight, rstd, 0.0, True, dx, True)
    assert dw is not None, "asked for"
    return found, [expected, dx, dw]


def _layer_norm(draw: Callable[..., torch.Tensor]) -> tuple[Tensors, Tensors]:
    x, weight, bias, dy = draw(3, 5, 100), draw(100), draw(100), draw(3, 5, 100)
    y = layer_norm(x, weight, bias, EPS)
    found = [y, *torch.autograd.grad(y, [x, weight, bias], dy)]
    expected, mean, rstd = reference.layer_norm_fwd(x, weight, bias, EPS)
    gradients = [torch.empty_like(t) for t in (x, weight, bias)]
    reference.layer_norm_bwd(dy, x, weight, mean, rstd, *gradients)
    return found, [expected, *gradients]


def _rope(draw: Callable[..., torch.Tensor]) -> tuple[Tensors, Tensors]:
    q, k = draw(2, 7, 4, 24).transpose(1, 2), draw(2, 7, 2, 24).transpose(1, 2)
    cos, sin = draw(1, 7, 16).detach(), draw(1, 7, 16).detach()
    outputs = apply_rotary(q, k, cos, sin)
    gradients = [torch.randn_like(output) for output in outputs]
    found = [*outputs, *torch.autograd.grad(outputs, [q, k], gradients)]
    expected = reference.rope_fwd(q, k, cos, sin, 1, False)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    reference.rope_bwd(gradients[0], gradients[1], cos, sin, 1, dq, dk)
    return found, [*expected, dq, dk]


def _qk_norm_rope(draw: Callable[..., torch.Tensor]) -> tuple[Tensors, Tensors]:
    q, k = draw(2, 7, 4, 24).transpose(1, 2), draw(2, 7, 2, 24).transpose(1, 2)
    q_weight, k_weight = draw(24), draw(24)
    cos, sin = draw(1, 7, 24).detach(), draw(1, 7, 24).detach()
    outputs = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, q_eps=EPS, k_eps=EPS)
    gradients = [torch.randn_like(output) for output in outputs]
    found = [*outputs, *torch.autograd.grad(outputs, [q, k, q_weight, k_weight], gradients)]
    tensors = q, k, q_weight, k_weight, cos, sin
    q_out, k_out, q_rstd, k_rstd = reference.qk_norm_rope_fwd(*tensors, EPS, EPS, 0.0, True, 1, False)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dws = reference.qk_norm_rope_bwd(
        gradients[0], gradients[1], *tensors, q_rstd, k_rstd, 0.0, True, 1, dq, dk, True, True
    )
    return found, [q_out, k_out, dq, dk, *(dw for dw in dws if dw is not None)]


def _glu(draw: Callable[..., torch.Tensor], activation: str) -> tuple[Tensors, Tensors]:
    gate, up, dy = draw(11, 70), draw(11, 70), draw(11, 70)
    y = glu(gate, up, activation)
    found = [y, *torch.autograd.grad(y, [gate, up], dy)]
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    reference.glu_bwd(dy, gate, up, dgate, dup, activation)
    return found, [reference.glu_fwd(gate, up, activation), dgate, dup]


def _glu_fused(draw: Callable[..., torch.Tensor]) -> tuple[Tensors, Tensors]:
    gate_up, dy = draw(11, 140), draw(11, 70)
    y = glu_fused(gate_up, "silu")
    found = [y, *torch.autograd.grad(y, [gate_up], dy)]
    gate, up = gate_up.detach().chunk(2, -1)
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    reference.glu_bwd(dy, gate, up, dgate, dup, "silu")
    return found, [reference.glu_fwd(gate, up, "silu"), torch.cat((dgate, dup), -1)]


def _activate(draw: Callable[..., torch.Tensor], activation: str) -> tuple[Tensors, Tensors]:
    x, dy = draw(11, 70), draw(11, 70)
    y = activate(x, activation)
    found = [y, *torch.autograd.grad(y, [x], dy)]
    dx = torch.empty_like(x)
    reference.activate_bwd(dy, x, dx, activation)
    return found, [reference.activate_fwd(x, activation), dx]


def _log_probs(draw: Callable[..., torch.Tensor]) -> tuple[Tensors, Tensors]:
    y = draw(11, 1000).detach()
    targets = torch.arange(11, device=y.device) * 90
    results = []
    for module in (rows_implementation(y), reference):
        out = RowStatistics.empty(11, ("entropy",), y, torch.float32)
        slope, again = y.clone(), y.clone()
        module.log_probs(slope, targets, out, LogitShape(cap=5.0), 0.1, 1.0)
        grads = out.log_sum_exp, out.entropy, out.log_probs, out.entropy
        module.log_probs_gradient(again, targets, *grads, LogitShape(cap=5.0), 0.1, 1.0)
        assert out.entropy is not None, "asked for"
        results.append([out.log_probs, out.entropy, slope, again])
    return results[0], results[1]


def _block_norm(draw: Callable[..., torch.Tensor]) -> tuple[Tensors, Tensors]:
    x, dn, residual = (draw(11, 100).detach() for _ in range(3))
    norm = Norm(draw(100).detach(), draw(100).detach(), EPS, is_layer=True)
    results = []
    for module in (
        implementation_beside("reference_blocks", "block_norm", x),
        reference_blocks,
    ):
        out, dx, grad = torch.empty_like(x), torch.empty_like(x), dn.clone()
        stats = torch.empty(2, 11, device=x.device)
        module.block_norm_fwd(x, norm, residual, out, stats)
        module.block_norm_bwd(grad, x, norm, stats, residual, dx, True)
        results.append([out, dx, grad])
    return results[0], results[1]


def _lora_glu(draw: Callable[..., torch.Tensor]) -> tuple[Tensors, Tensors]:
    gate, up, dy = (draw(11, 70).detach() for _ in range(3))
    terms = [LowRank(draw(11, 4).detach(), draw(70, 4).detach()) for _ in range(3)]
    results = []
    for module in (
        implementation_beside("reference_blocks", "lora_glu", gate),
        reference_blocks,
    ):
        y, grad, dgate, dup = torch.empty_like(gate), dy.clone(), gate.clone(), up.clone()
        module.lora_glu_fwd(dgate, dup, terms[0], terms[1], "silu", y)
        args = dgate, dup, dgate, dup, "silu", *terms[:2]
        sums = module.lora_glu_bwd(grad, terms[2], *args, True, False)
        results.append([y, *(t.clone() for t in (grad, dgate, dup)), *sums[:2]])
        results[-1].append(module.lora_glu_bwd(grad, terms[2], *args, False, True)[2])
    return results[0], results[1]


def _lora_residual(draw: Callable[..., torch.Tensor]) -> tuple[Tensors, Tensors]:
    y, residual = draw(11, 70).detach(), draw(11, 70).detach()
    term = LowRank(draw(11, 4).detach(), draw(70, 4).detach())
    results = []
    for module in (implementation_beside("reference_blocks", "lora_residual", y), reference_blocks):
        out = torch.empty_like(residual)
        module.lora_residual(y, term, residual, out)
        results.append([out])
    return results[0], results[1]


def _lora_rope(draw: Callable[..., torch.Tensor]) -> tuple[Tensors, Tensors]:
    y, cos, sin = draw(14, 4 * 32).detach(), draw(1, 7, 32).detach(), draw(1, 7, 32).detach()
    term = LowRank(draw(14, 4).detach(), draw(4 * 32, 4).detach())
    results = []
    for module in (implementation_beside("reference_blocks", "lora_rope", y), reference_blocks):
        results.append([y.clone()])
        module.lora_rope(results[-1][0], term, cos, sin, (2, 1, 1), False)
    return results[0], results[1]


def _copies(draw: Callable[..., torch.Tensor]) -> tuple[Tensors, Tensors]:
    sources = [draw(7, 100).detach(), draw(4100, 2)[:, :1].detach()]
    targets = [torch.empty(s.shape, dtype=torch.float16, device=s.device) for s in sources]
    Copies(sources, targets).run()
    return targets, [source.half() for source in sources]


def _four_bit(draw: Callable[..., torch.Tensor]) -> tuple[Tensors, Tensors]:
    like = draw(1)
    packed = torch.randint(256, (12 * 32,), dtype=torch.uint8).to(like.device)
    absmax, code = torch.rand(12).to(like.device), torch.linspace(-1, 1, 16).to(like.device)
    weight = FourBit(packed=packed, absmax=absmax, code=code, blocksize=64, shape=(12, 64), dtype=like.dtype)
    found, expected = (torch.empty(12, 64, dtype=like.dtype, device=like.device) for _ in range(2))
    dequantize_four_bit(weight, found)
    reference_four_bit.dequantize(weight, expected)
    return [found], [expected]


KERNELS: dict[str, Check] = {
    "block_norm": _block_norm,
    "lora_glu": _lora_glu,
    "lora_residual": _lora_residual,
    "lora_rope": _lora_rope,
    "copies": _copies,
    "four_bit": _four_bit,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rope": _rope,
    "qk_norm_rope": _qk_norm_rope,
    "glu_fused": _glu_fused,
    "log_probs": _log_probs,
    **{f"glu {name}": functools.partial(_glu, activation=name) for name in ACTIVATIONS},
    **{f"activate {name}": functools.partial(_activate, activation=name) for name in ACTIVATIONS},
}


def checks() -> Iterator[dict[str, object]]:
    """Run all kernels on the first CUDA device, or on the CPU; one entry for each kernel and dtype."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The interpreter's bf16 is not the hardware's, so it would be judged for nothing.
    dtypes = [torch.float32, torch.float16, torch.bfloat16] if device == "cuda" else [torch.float32, torch.float16]
    for name, run in KERNELS.items():
        for dtype in dtypes:
            torch.manual_seed(0)

            def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                return torch.randn(shape, dtype=dtype, device=device).requires_grad_()

            found, expected = run(draw)
            errors = [
                ((a.double() - b.double()).norm() / b.double().norm()).item()
                for a, b in zip(found, expected, strict=True)
            ]
            limit = 4 * torch.finfo(dtype).eps
            yield {
                "kernel": f"{name} {str(dtype).removeprefix('torch.')}",
                "backend": f"{backend_for(draw(1))} on {device}",
                "error": max(errors),
                "limit": limit,
                # A NaN is not within any limit.
                "ok": all(error <= limit for error in errors),
            }


def main() -> int:
    """Print the checks; 1 if one is wrong."""
    wrong = 0
    for check in checks():
        sys.stdout.write(json.dumps(check) + "\n")
        wrong += not check["ok"]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Log-probabilities of one target in each row of projections [n, V], and their gradient written over the projections.

One program to a row. The first walk keeps a running maximum and sums relative to it; the second reads the row again,
mostly from the L2 cache, and writes. Exponentials are powers of two.
"""
# Kernels are written in Triton's language, not in typed Python.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl

from .dispatch import on_device_of
from .ops.vocab_rows import LogitShape, RowStatistics
from .rows import cdiv

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(u):
    """tanh of u in fp32, without the cancellation of 1 - 2 / (exp(2u) + 1) near zero."""
    square = u * u
    near = u * (1.0 + square * (-0.333333333 + square * (0.133333333 + square * (-0.053968254 + square * 0.021869489))))
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(u)))
    return tl.where(tl.abs(u) < 0.25, near, tl.where(u < 0.0, -far, far))


@triton.jit
def _logit(y, pre, cap, post, HAS_CAP: tl.constexpr):
    """The logit of a projection."""
    z = y * pre
    if HAS_CAP:
        z = cap * _tanh(z / cap)
    return z * post


@triton.jit
def _cap_slope(y, pre, cap):
    """The derivative of cap * tanh(u / cap) at u = pre * y."""
    t = _tanh(y * pre / cap)
    return 1.0 - t * t


@triton.jit
def log_probs_kernel(
    y_ptr, stride, target_ptr, log_prob_ptr, lse_ptr, entropy_ptr, squares_ptr, mean_ptr, top1_ptr,
    vocabulary, weight, pre, cap, post, smoothing,
    HAS_CAP: tl.constexpr, HAS_SUM: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SQUARES: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_TOP1: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of one row; with WRITE, y becomes weight * d log_prob / dy. A target of -1 makes both 0."""
    row = tl.program_id(0)
    y_row = y_ptr + row.to(tl.int64) * stride
    target = tl.load(target_ptr + row).to(tl.int32)
    columns = tl.arange(0, BLOCK)
    counts = target >= 0
    inside = counts & (target < vocabulary)
    chosen = _logit(tl.load(y_row + target, mask=inside, other=float("nan")).to(tl.float32), pre, cap, post, HAS_CAP)
    top = float("-inf")
    sums = tl.zeros((BLOCK,), tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    beaten = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocabulary, BLOCK):
        at = start + columns
        mask = at < vocabulary
        y = tl.load(y_row + at, mask=mask, other=0.0).to(tl.float32)
        z = _logit(y, pre, cap, post, HAS_CAP)
        if HAS_SUM:
            totals += tl.where(mask, z, 0.0)
        if HAS_TOP1:
            # The target's own logit, computed again, may differ from `chosen` in the last bit.
            beaten |= (mask & (at != target) & ((z > chosen) | ((z == chosen) & (at < target)))).to(tl.int32)
        z = tl.where(mask, z * LOG2E, float("-inf"))
        higher = tl.maximum(top, tl.max(z, axis=0))
        # While all is -inf, any finite number keeps the differences from being NaN.
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(top - origin)
        e = tl.exp2(z - origin)
        sums = sums * shrink + e
        if HAS_ENTROPY:
            weighted = weighted * shrink + tl.where(e == 0.0, 0.0, e * z)
        if HAS_SQUARES:
            squares = squares * (shrink * shrink) + e * e
        top = higher
    total = tl.sum(sums, axis=0)
    lse2 = top + tl.log2(total)
    log_prob = chosen - lse2 * LN2
    if HAS_SUM:
        mean = tl.sum(totals, axis=0) / vocabulary
        if HAS_MEAN:
            tl.store(mean_ptr + row, mean)
        if smoothing > 0.0:
            log_prob = (1.0 - smoothing) * log_prob + smoothing * (mean - lse2 * LN2)
    tl.store(log_prob_ptr + row, tl.where(counts, log_prob, 0.0))
    tl.store(lse_ptr + row, lse2 * LN2)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + row, (lse2 - tl.sum(weighted, axis=0) / total) * LN2)
    if HAS_SQUARES:
        tl.store(squares_ptr + row, (tl.log2(tl.sum(squares, axis=0)) - 2.0 * tl.log2(total)) * LN2)
    if HAS_TOP1:
        tl.store(top1_ptr + row, (tl.max(beaten, axis=0) == 0).to(tl.int8))
    if WRITE:
        spread = smoothing / vocabulary
        scale = weight * pre * post
        for start in range(0, vocabulary, BLOCK):
            at = start + columns
            mask = at < vocabulary
            y = tl.load(y_row + at, mask=mask, other=0.0).to(tl.float32)
            z = _logit(y, pre, cap, post, HAS_CAP)
            slope = tl.where(at == target, 1.0 - smoothing, 0.0) + spread - tl.exp2(z * LOG2E - lse2)
            slope = slope * scale
            if HAS_CAP:
                slope = slope * _cap_slope(y, pre, cap)
            tl.store(y_row + at, tl.where(counts, slope, 0.0).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradient_kernel(
    y_ptr, stride, target_ptr, lse_ptr, entropy_ptr, grad_ptr, grad_entropy_ptr,
    vocabulary, weight, pre, cap, post, smoothing,
    HAS_CAP: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row of y becomes the gradient of the row's log-probability and entropy."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < vocabulary
    y_at = y_ptr + row.to(tl.int64) * stride + at
    y = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
    log_p = _logit(y, pre, cap, post, HAS_CAP) - tl.load(lse_ptr + row)
    p = tl.exp2(log_p * LOG2E)
    slope = tl.zeros((BLOCK,), tl.float32)
    if HAS_GRAD:
        target = tl.load(target_ptr + row).to(tl.int32)
        toward = tl.where(at == target, 1.0 - smoothing, 0.0) + smoothing / vocabulary - p
        slope += tl.load(grad_ptr + row) * toward
    if HAS_ENTROPY:
        lack = tl.where(p == 0.0, 0.0, p * (log_p + tl.load(entropy_ptr + row)))
        slope -= tl.load(grad_entropy_ptr + row) * lack
    slope = slope * (weight * pre * post)
    if HAS_CAP:
        slope = slope * _cap_slope(y, pre, cap)
    tl.store(y_at, slope.to(y_ptr.dtype.element_ty), mask=mask)


BLOCK, WARPS = 2048, 8


def _numbers(shape: LogitShape) -> tuple[float, float, float]:
    return float(shape.pre), 1.0 if shape.cap is None else float(shape.cap), float(shape.post)


def log_probs(
    y: torch.Tensor,
    targets: torch.Tensor,
    out: RowStatistics,
    shape: LogitShape,
    smoothing: float,
    weight: float | None,
) -> None:
    """Fill `out` from y and, unless `weight` is None, overwrite y; same contract as `reference.log_probs`."""
    n, vocabulary = y.shape
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    unused = out.log_probs
    with on_device_of(y):
        log_probs_kernel[(n,)](
            y, y.stride(0), targets, out.log_probs, out.log_sum_exp,
            *(unused if item is None else item for item in (out.entropy, out.log_sum_sq_probs, out.mean_logits)),
            unused if out.is_top1 is None else out.is_top1.view(torch.int8),
            vocabulary, 0.0 if weight is None else weight, *_numbers(shape), smoothing,
            HAS_CAP=shape.cap is not None, HAS_SUM=smoothing > 0.0 or out.mean_logits is not None,
            HAS_ENTROPY=out.entropy is not None, HAS_SQUARES=out.log_sum_sq_probs is not None,
            HAS_MEAN=out.mean_logits is not None, HAS_TOP1=out.is_top1 is not None, WRITE=weight is not None,
            BLOCK=block, num_warps=WARPS if block == BLOCK else 4,
        )  # fmt: skip


def log_probs_gradient(
    y: torch.Tensor,
    targets: torch.Tensor,
    log_sum_exp: torch.Tensor,
    entropy: torch.Tensor | None,
    grad: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    shape: LogitShape,
    smoothing: float,
    weight: float,
) -> None:
    """Overwrite y with the gradient; same contract as `reference.log_probs_gradient`."""
    n, vocabulary = y.shape
    with on_device_of(y):
        gradient_kernel[(n, cdiv(vocabulary, 2048))](
            y, y.stride(0), targets, log_sum_exp,
            log_sum_exp if entropy is None else entropy,
            log_sum_exp if grad is None else grad,
            log_sum_exp if grad_entropy is None else grad_entropy,
            vocabulary, weight, *_numbers(shape), smoothing,
            HAS_CAP=shape.cap is not None, HAS_GRAD=grad is not None, HAS_ENTROPY=grad_entropy is not None,
            BLOCK=2048, num_warps=4,
        )  # fmt: skip

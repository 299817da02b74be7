"""The fused head on a GPU at real vocabularies: values and gradients against torch, and the memory that it takes."""

import pytest
import torch
from torch.nn import functional as F

from sloth_plugins.patches.kernels.ops.vocab_rows import LogitShape
from sloth_plugins.patches.losses.labels import LabelCount
from sloth_plugins.patches.losses.linear_log_probs import linear_cross_entropy, linear_log_probs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HIDDEN = 512
GIB = 2**30


def inputs(n, vocabulary, dtype, hidden=HIDDEN):
    torch.manual_seed(0)
    with torch.device("cuda"):
        weight = (torch.randn(vocabulary, hidden) / hidden**0.5).to(dtype)
        return torch.randn(n, hidden).to(dtype), weight, torch.randint(0, vocabulary, (n,))


def distance(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("vocabulary", [257, 32000, 128256, 262208])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("case", ["plain", "softcap", "smoothing", "ignored"])
def test_cross_entropy(vocabulary, dtype, trained, case):
    hidden, weight, targets = inputs(777, vocabulary, dtype)
    if case == "ignored":
        targets[::2] = -100
    cap, smoothing = (3.0 if case == "softcap" else None), (0.1 if case == "smoothing" else 0.0)

    def run(function, *tensors):
        leaves = [tensor.detach().clone() for tensor in tensors]
        leaves[0].requires_grad_()
        leaves[1].requires_grad_(trained)
        loss = function(*leaves)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]

    def plain(h, w):
        z = F.linear(h, w)
        z = z if z.dtype is torch.float64 else z.float()
        z = z if cap is None else cap * torch.tanh(z / cap)
        return F.cross_entropy(z, targets, label_smoothing=smoothing)

    def ours(h, w):
        return linear_cross_entropy(h, w, None, targets, shape=LogitShape(cap=cap), smoothing=smoothing)

    truth = run(plain, hidden.double(), weight.double())
    for name, found, own, exact in zip(
        ("loss", "hidden", "weight"), run(ours, hidden, weight), run(plain, hidden, weight), truth, strict=False
    ):
        assert torch.isfinite(found).all()
        # 1e-6 is what fp32 reaches; stock's own distance decides in the narrow dtypes.
        assert distance(found, exact) <= max(1.1 * distance(own, exact), 1e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_log_probs_and_entropy(dtype, trained):
    hidden, weight, targets = inputs(1500, 50257, dtype)
    mix = torch.linspace(-1, 1, 1500, device="cuda")

    def run(function, *tensors):
        leaves = [tensor.detach().clone() for tensor in tensors]
        leaves[0].requires_grad_()
        leaves[1].requires_grad_(trained)
        log_probs, entropy = function(*leaves)
        (log_probs * mix + entropy.pow(2)).sum().backward()
        return [log_probs.detach(), entropy.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]

    def plain(h, w):
        log_p = F.linear(h, w)
        log_p = (log_p if log_p.dtype is torch.float64 else log_p.float()).log_softmax(-1)
        return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    def ours(h, w):
        found = linear_log_probs(h, w, None, targets, outputs=("entropy",))
        return found.log_probs, found.entropy

    truth = run(plain, hidden.double(), weight.double())
    for found, own, exact in zip(run(ours, hidden, weight), run(plain, hidden, weight), truth, strict=True):
        assert distance(found, exact) <= max(1.1 * distance(own, exact), 2e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("trained", [False, True])
def test_nobody_waits_for_the_device(trained, reduction):
    """Where nearly all labels count, which is asked before."""
    hidden, weight, targets = inputs(4096, 32000, torch.bfloat16)
    targets[::1000] = -100
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    truth = F.cross_entropy(hidden.detach().float() @ weight.detach().float().t(), targets, reduction=reduction)
    labels = LabelCount.of(targets)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = linear_cross_entropy(hidden, weight, None, targets, labels=labels, reduction=reduction)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.detach(), truth, rtol=1e-3, atol=0)
    assert (hidden.grad[::1000] == 0).all()


@pytest.mark.parametrize("vocabulary", [128256, 262208])
@pytest.mark.parametrize("n", [4096, 16384])
def test_memory_of_a_frozen_head(vocabulary, n):
    hidden, weight, targets = inputs(n, vocabulary, torch.bfloat16, hidden=2048)
    hidden.requires_grad_()
    linear_cross_entropy(hidden[:64], weight, None, targets[:64]).backward()  # workspaces of the products
    hidden.grad = torch.zeros_like(hidden)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, None, targets), hidden)
    extra = torch.cuda.max_memory_allocated() - before - grad.numel() * grad.element_size()
    assert extra < 0.6 * GIB, f"{extra / GIB:.3f} GiB"


def test_offsets_beyond_32_bits(monkeypatch):
    """A chunk of more than 2^31 elements."""
    monkeypatch.setattr("sloth_plugins.patches.losses.chunks.tile_rows", lambda *args, **kwargs: 10**6)
    hidden, weight, targets = inputs(9000, 262208, torch.bfloat16, hidden=64)
    found = linear_log_probs(hidden, weight, None, targets).log_probs
    last = slice(8500, 9000)
    expected = F.linear(hidden[last], weight).float().log_softmax(-1).gather(-1, targets[last, None])[:, 0]
    torch.testing.assert_close(found[last], expected, rtol=1e-4, atol=1e-4)

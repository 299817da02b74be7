"""What the fused head costs: matrix products, and memory beyond its inputs and their gradients."""

import pytest
import torch
from live_bytes import LiveBytes
from torch.nn import functional as F

from sloth_plugins.patches.losses import rows
from sloth_plugins.patches.losses.linear_log_probs import linear_cross_entropy, linear_log_probs

N, HIDDEN, VOCABULARY, CHUNK = 60, 8, 1000, 10


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(rows, "CPU_TILE_BYTES", CHUNK * VOCABULARY * 4)


def leaves(*, trained, dtype=torch.float32):
    made = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, HIDDEN, generator=made, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=made, dtype=dtype).requires_grad_(trained)
    return hidden, weight, torch.randint(0, VOCABULARY, (N,), generator=made)


def cost(function):
    with LiveBytes() as live:
        function().backward()
    flops = sum(m * k * n for m, k, n in live.products)
    return flops / (N * HIDDEN * VOCABULARY), live.peak


@pytest.mark.parametrize(("trained", "products"), [(False, 2), (True, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_products_of_a_loss_that_sums(trained, products, reduction):
    hidden, weight, targets = leaves(trained=trained)
    found, _ = cost(lambda: linear_cross_entropy(hidden, weight, None, targets, reduction=reduction))
    assert found == products


@pytest.mark.parametrize(("trained", "products"), [(False, 2), (True, 4)])
def test_products_of_any_function(trained, products):
    hidden, weight, targets = leaves(trained=trained)
    found, _ = cost(lambda: linear_log_probs(hidden, weight, None, targets).log_probs.pow(2).sum())
    assert found == products


def test_products_where_half_the_rows_count():
    hidden, weight, targets = leaves(trained=False)
    targets[::2] = -100
    assert cost(lambda: linear_cross_entropy(hidden, weight, None, targets))[0] == 1


def test_one_product_without_a_gradient():
    hidden, weight, targets = leaves(trained=True)
    with LiveBytes() as live, torch.no_grad():
        found = linear_cross_entropy(hidden, weight, None, targets)
    assert sum(m * k * n for m, k, n in live.products) == N * HIDDEN * VOCABULARY
    assert not found.requires_grad


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("function", ["loss", "log_probs"])
def test_memory_is_a_chunk_and_the_gradients(function, trained):
    hidden, weight, targets = leaves(trained=trained)

    def ours():
        if function == "loss":
            return linear_cross_entropy(hidden, weight, None, targets)
        return linear_log_probs(hidden, weight, None, targets).log_probs.pow(2).sum()

    tile = CHUNK * VOCABULARY * 4
    gradients = 4 * (hidden.numel() + (weight.numel() if trained else 0))
    by_row = 4 * 8 * N * 4  # statistics and indices
    # The reference works on a tile through torch's operations, of which some need another.
    _, peak = cost(ours)
    assert peak <= 5 * tile + gradients + by_row
    _, stock = cost(lambda: F.cross_entropy(F.linear(hidden, weight), targets))
    assert stock >= 2 * N * VOCABULARY * 4


def test_memory_of_the_loss_does_not_grow_with_its_rows():
    peaks = []
    for copies in (1, 4):
        hidden, weight, targets = leaves(trained=False)
        hidden = hidden.detach().repeat(copies, 1).requires_grad_()
        at = targets.repeat(copies)
        _, peak = cost(lambda hidden=hidden, at=at, weight=weight: linear_cross_entropy(hidden, weight, None, at))
        peaks.append(peak - 4 * hidden.numel())
    assert peaks[1] - peaks[0] <= 3 * N * 100

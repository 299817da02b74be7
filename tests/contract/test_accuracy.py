"""Each patch alone and all together: no further from float64 than four times torch's own error in that dtype."""

import pytest
import torch
from models import KINDS, PATCHES, batch, build

from sloth_plugins.verification import compare

SELECTIONS = [(a, kind, f"{a}:{patch}") for a, kind, patch in PATCHES] + [(a, kind, a) for a, kind in KINDS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("architecture", "kind", "selection"), SELECTIONS, ids=[f"{s[1]}-{s[2]}" for s in SELECTIONS])
def test_loss_and_gradients_against_float64(architecture, kind, selection, dtype):
    verdict = compare(lambda: build(architecture, kind).to(dtype), selection, tokens=33, seed=1)
    assert verdict.truth == "float64"
    assert verdict.report.applied
    assert len(verdict.rows) > 10
    assert [row for row in verdict.rows if not row.ok] == []


@pytest.mark.parametrize(("architecture", "kind"), KINDS)
def test_a_wrong_kernel_is_caught(architecture, kind, monkeypatch):
    from sloth_plugins.patches.kernels import ops

    for name in ("rms_norm", "layer_norm"):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, real=real, **kwargs: real(*args, **kwargs) * 1.00001)
    verdict = compare(lambda: build(architecture, kind), "1", tokens=33, seed=1)
    assert not verdict.passed


@pytest.mark.parametrize(("architecture", "kind"), KINDS)
def test_autocast_gives_what_stock_gives(architecture, kind):
    import sloth_plugins

    stock, model = build(architecture, kind), build(architecture, kind)
    sloth_plugins.patch(model, "1")
    ids = batch()
    grads = []
    for network in (stock, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = network(input_ids=ids, labels=ids).loss
        loss.backward()
        grads.append({name: p.grad for name, p in network.named_parameters()})
    for name, grad in grads[0].items():
        assert grads[1][name].dtype == grad.dtype
        assert (grads[1][name] - grad).norm() <= 8 * torch.finfo(torch.bfloat16).eps * grad.norm(), name

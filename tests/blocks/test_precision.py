"""In half precision fused gradients are as near to those of an fp32 copy as stock's are."""

import copy

import pytest
import torch
from lora_models import batch, fuse, gradients, lora_model

pytestmark = pytest.mark.filterwarnings("ignore")
SEEDS = range(6)
BF16 = torch.bfloat16
# (dtype of the base, dtype of the adapters, whether it runs under autocast)
CASES = {
    "bf16 under autocast, fp32 adapters": (BF16, torch.float32, True),
    "bf16 with bf16 adapters": (BF16, BF16, False),
    "bf16 under autocast, bf16 adapters": (BF16, BF16, True),
    "fp32 under autocast": (torch.float32, torch.float32, True),
}


def in_dtypes(model, base, adapters):
    model = model.to(base)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters)
    return model


def measured(model, autocast):
    """Gradients in fp32 for each seed's batch, as one vector each."""
    found = []
    for seed in SEEDS:
        with torch.autocast("cpu", BF16, enabled=autocast):
            grads = gradients(model, batch(3, 24, seed=seed))[1]
        found.append(torch.cat([grad.float().flatten() for grad in grads.values()]))
    return found


def error(found, truth):
    return (sum((f - t).square().sum() for f, t in zip(found, truth, strict=True)) / len(truth)).sqrt().item()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["keep", "input"])
@pytest.mark.parametrize("family", [("llama", "llama"), ("gemma2", "gemma2"), ("phi", "phi")], ids=lambda f: f[0])
@pytest.mark.parametrize("case", CASES)
def test_no_further_from_fp32_than_stock(case, family, checkpointing, runs):
    base, adapters, autocast = CASES[case]
    model = in_dtypes(lora_model(*family), base, adapters)
    # The same numbers, computed with in fp32.
    truth = measured(copy.deepcopy(model).float(), False)
    stock = error(measured(model, autocast), truth)
    if checkpointing:
        model.gradient_checkpointing_enable()
    fuse(model)
    ours = error(measured(model, autocast), truth)
    assert len(runs) == 2 * len(SEEDS)
    assert all(run.dtype is BF16 for run in runs)
    assert stock > 0
    assert ours <= 1.15 * stock, f"{ours:.3e} from fp32, stock {stock:.3e}"


@pytest.mark.parametrize("case", CASES)
def test_dtypes_are_stocks(case):
    """Of outputs, of gradients, and of what goes from layer to layer."""
    base, adapters, autocast = CASES[case]
    model = in_dtypes(lora_model(), base, adapters)
    seen = []
    for layer in model.base_model.model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    results = []
    for _ in range(2):
        with torch.autocast("cpu", BF16, enabled=autocast):
            loss, grads = gradients(model)
        results.append((loss.dtype, {name: grad.dtype for name, grad in grads.items()}))
        if len(results) == 1:
            fuse(model)
    assert results[0] == results[1]
    assert seen[:2] == seen[2:]


def test_a_mask_of_the_users_under_autocast(runs):
    """A float mask as wide as the model's dtype, while the products are in bf16."""
    model = lora_model()
    mask = torch.zeros(2, 1, 13, 13).masked_fill(~torch.ones(13, 13, dtype=torch.bool).tril(), -1e9)
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", BF16):
            losses.append(gradients(model, attention_mask=mask)[0])
        if len(losses) == 1:
            fuse(model)
    assert len(runs) == 2
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)

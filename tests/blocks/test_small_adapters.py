"""In bf16 small adapters move the hidden states as far as in stock: no rounding swallows what stock lets through.

Early in training what an adapter adds is less than a unit of the numbers that it is added to. What comes of it then
depends on what is rounded before, and losses fall at another pace while every gradient is as exact as stock's.
"""

import copy

import pytest
import torch
from lora_models import batch, fuse, lora_model
from tiny_families import KINDS

pytestmark = pytest.mark.filterwarnings("ignore")
BF16 = torch.bfloat16
# In each the residual stream is far larger than what a block adds to it.
FAMILIES = [family for family in KINDS if family[1] in ("llama", "phi3", "phi")]


def moved(model, autocast):
    """What the adapters change in the last hidden states, in fp64; the same inputs with and without them."""
    states = []
    body = model.base_model.model.model
    norm = body.final_layernorm if hasattr(body, "final_layernorm") else body.norm
    # A hook of the layers' own would have them run as they are.
    hook = norm.register_forward_pre_hook(lambda module, args: states.append(args[0].double()))
    for seed in range(8):
        ids = batch(3, 24, seed=seed)
        for adapted in (True, False):
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data = parameter.given if adapted else torch.zeros_like(parameter.given)
            with torch.autocast("cpu", BF16, enabled=autocast):
                model(input_ids=ids)
    hook.remove()
    return torch.cat(states[::2]) - torch.cat(states[1::2])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["keep", "input"])
@pytest.mark.parametrize("target", ["all-linear", "last"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f[1])
def test_they_move_as_far_as_in_stock(family, target, checkpointing, runs):
    names = ["o_proj", "down_proj", "dense", "fc2"]
    targets = "all-linear" if target == "all-linear" else names[2:] if family[1] == "phi" else names[:2]
    model = lora_model(*family, target_modules=targets, changes={"hidden_size": 128})
    model.get_input_embeddings().weight.data.mul_(8.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(2**-11)
    exact = copy.deepcopy(model)
    model = model.to(BF16)
    for given in (exact, model):
        for name, parameter in given.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
            parameter.given = parameter.data
    truth = moved(exact, False)

    def let_through():
        return ((moved(model, True) * truth).sum() / truth.square().sum()).item()

    stock = let_through()
    if checkpointing:
        model.gradient_checkpointing_enable()
    fuse(model)
    ours = let_through()
    print(f"{family[1]} {target}: stock {stock:.2f}, ours {ours:.2f} of what fp32 moves")
    assert runs
    assert ours == pytest.approx(stock, rel=0.15)

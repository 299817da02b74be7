"""Plans on a card: peaks within what was expected and allowed, gradients to the bit, host memory, real shortages."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sloth_plugins import patch, segments
from sloth_plugins.patches.blocks import graphs
from sloth_plugins.patches.blocks.policy import Policy
from sloth_plugins.patches.checkpointing import backbone
from sloth_plugins.patches.checkpointing.budget import Budget

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SIZES, use_cache=False)).to("cuda", torch.bfloat16)
    config = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    made = peft.get_peft_model(made, config).train()
    patch(made, "*:blocks,*:cross_entropy,*:checkpointing")
    return made


@pytest.fixture
def stack(model, monkeypatch):
    # What they hold is there between steps.
    monkeypatch.setenv("SLOTH_GRAPHS", "0")
    for _ in range(3):
        step(model, 4096)
    (found,) = backbone.stacks_of(model)
    yield found
    found.budget, found.host_budget, found.share = Budget(), backbone.host_budget(), 1.0
    found._plans.clear()


def batch(tokens, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 32000, (1, tokens), generator=draw).cuda()


def step(model, tokens, seed=0):
    model.zero_grad()
    ids = batch(tokens, seed)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def measured(model, stack, tokens):
    """(peak of a step, what was expected), both beyond what was there before."""
    model.zero_grad()
    ids = batch(tokens)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    return torch.cuda.max_memory_allocated() - before, stack.predicted - before


@pytest.mark.parametrize("tokens", [2048, 4096, 6000])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_peaks_are_as_expected(model, stack, tokens, share):
    stack.host_budget = 0
    predicted = []
    for kind in ("auto", "min"):
        stack.budget = Budget(kind)
        step(model, tokens)
        predicted.append(stack.predicted)
    stack.budget = Budget("bytes", predicted[1] + share * (predicted[0] - predicted[1]))
    step(model, tokens)
    taken, expected = measured(model, stack, tokens)
    print(f"{tokens} tokens, share {share}: taken {taken / 2**20:.0f} MiB, expected {expected / 2**20:.0f}")
    # Learned was from 4096 tokens. The loss takes its logits by chunks, which need not grow with the tokens.
    assert (0.9 if tokens == 4096 else 0.7) < taken / expected < 1.02


def test_gradients_are_those_of_keep_to_the_bit(model, stack):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        # For more tokens cuDNN's attention adds up in an order that differs from one backward to the next.
        loss, expected = step(model, 512)
        assert stack.current.share == 0.0
        for kind, host in (("min", 0), ("min", 2**33)):
            stack.budget, stack.host_budget = Budget(kind), host
            stack._plans.clear()
            found_loss, found = step(model, 512)
            assert stack.current.share > 0.9
            assert any(option.on_host for option in stack.current.options) is (host > 0)
            assert torch.equal(found_loss, loss)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_inputs_on_the_host_take_no_memory_of_the_device(model, stack):
    stack.budget, stack.host_budget = Budget("min"), 0
    step(model, 4096)
    plain, _ = measured(model, stack, 4096)
    stack.host_budget = 2**33
    stack._plans.clear()
    step(model, 4096)
    parked, expected = measured(model, stack, 4096)
    assert [option.policy for option in stack.current.options].count(Policy.KEEP) < 12
    assert parked < plain
    assert parked < 1.05 * expected


def test_a_cap_is_kept(model, stack):
    step(model, 8000)
    step(model, 8000)
    torch.cuda.empty_cache()
    segments.grow()
    total = torch.cuda.get_device_properties(0).total_memory
    cap = torch.cuda.memory_allocated() + 2 * 2**30
    torch.cuda.set_per_process_memory_fraction(cap / total)
    try:
        torch.cuda.reset_peak_memory_stats()
        for tokens in (8000, 3000, 8000, 500):
            step(model, tokens)
        assert torch.cuda.max_memory_reserved() <= cap
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        segments.stay()


def test_graphs_are_let_go_where_memory_is_short(model, stack, monkeypatch):
    monkeypatch.setenv("SLOTH_GRAPHS", "1")
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        step(model, 2048)
    model.zero_grad()
    held = torch.cuda.memory_allocated() - before
    assert graphs._devices
    assert held > 100 * 2**20
    stack.budget = Budget("min")
    step(model, 2048)
    model.zero_grad()
    assert not graphs._devices
    assert torch.cuda.memory_allocated() - before < 0.1 * held

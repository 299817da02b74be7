"""FLOPs that a step needs, against torch's own count of what it does, and pairs of tokens against counting them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from sloth_plugins.statistics.flops import count, needed
from sloth_plugins.statistics.peaks import peak_flops

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
}
ROWS, LENGTH = 2, 12


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}, attn_implementation="eager"))


def counted(model):
    """What torch counts in a forward and backward of [ROWS, LENGTH] tokens, with eager attention and all logits."""
    ids = torch.randint(SIZES["vocab_size"], (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


def of_all(found):
    """What is needed where each token sees all of its row, and each has a label."""
    return found.of(ROWS * LENGTH, ROWS * LENGTH, dict.fromkeys(found.pairs, ROWS * LENGTH**2))


@pytest.mark.parametrize("tied", [False, True])
def test_all_weights(tied):
    model = llama(tie_word_embeddings=tied)
    assert of_all(needed(model)) == counted(model)


def test_adapters():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))
    # Nothing before the first layer's k and v is trained but q's adapter, which gives them nothing.
    first = model.get_base_model().model.layers[0].self_attn
    parts = [part for p in (first.k_proj, first.v_proj) for part in (p.base_layer, p.lora_A["default"])]
    beyond = 2 * ROWS * LENGTH * sum(part.weight.numel() for part in parts)
    assert of_all(needed(model)) - beyond == counted(model)


def test_layers_below_those_with_adapters_need_no_backward():
    upper = get_peft_model(llama(), LoraConfig(r=4, target_modules=["down_proj"], layers_to_transform=[2]))
    every = get_peft_model(llama(), LoraConfig(r=4, target_modules=["down_proj"]))
    assert of_all(needed(upper)) < 0.75 * of_all(needed(every))


def test_a_quantised_weight_counts_by_its_shape():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, plain = llama(), llama()
    for layer in model.model.layers:
        layer.mlp.up_proj = bitsandbytes.nn.Linear4bit(32, 48, bias=False, quant_type="nf4").to("cpu")
    for found in (model, plain):
        found.requires_grad_(False)
        found.model.embed_tokens.weight.requires_grad_(True)
    assert needed(model) == needed(plain)


def test_a_head_that_is_trained_beside_its_original_counts_once():
    once = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert needed(once).label == 6 * SIZES["hidden_size"] * SIZES["vocab_size"]


def test_windows_are_counted_for_their_layers():
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5))
    assert needed(model).pairs == {5: 3 * 12 * 4 * 16}


def test_experts_and_frozen_models_are_left_out():
    sizes = {**SIZES, "num_local_experts": 4, "num_hidden_layers": 1}
    assert needed(MixtralForCausalLM(MixtralConfig(**sizes))) is None
    assert needed(llama().requires_grad_(False)) is None
    assert needed(torch.nn.Linear(2, 2)) is None


def seen(documents, window):
    """Pairs of a token and one that it sees, itself among them, counted one by one."""
    return sum(1 for n in documents for i in range(n) for j in range(i + 1) if window is None or i - j < window)


WINDOWS = (None, 4, 100)


def test_padded_rows():
    lengths, ids = [12, 7, 3], torch.ones(3, 12, dtype=torch.long)
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :5] = -100
    found = count({"input_ids": ids, "attention_mask": mask, "labels": labels}, WINDOWS)
    assert int(found.tokens) == 22
    # The first token of a row is never predicted.
    assert int(found.labels) == 7 + 6 + 2
    assert {w: int(n) for w, n in found.pairs.items()} == {w: seen(lengths, w) for w in WINDOWS}


def test_packed_rows():
    documents = [5, 6, 1]
    positions = torch.cat([torch.arange(n) for n in documents])[None]
    found = count({"input_ids": positions, "position_ids": positions, "labels": positions}, WINDOWS)
    assert int(found.tokens) == 12
    assert {w: int(n) for w, n in found.pairs.items()} == {w: seen(documents, w) for w in WINDOWS}


@pytest.mark.parametrize("inputs", [{}, [{"prompt": "a"}], {"input_ids": [1, 2]}, {"input_ids": torch.ones(3)}])
def test_batches_that_are_no_tokens(inputs):
    assert count(inputs, ()) is None


def test_counting_does_not_wait_for_the_device():
    class NoAnswer(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(func)
            assert "nonzero" not in str(func)
            return func(*args, **(kwargs or {}))

    ids = torch.ones(2, 6, dtype=torch.long)
    with NoAnswer():
        found = count({"input_ids": ids, "attention_mask": ids, "position_ids": ids, "labels": ids}, WINDOWS)
    assert int(found.tokens) == 12
    with pytest.raises(AssertionError), NoAnswer():
        int(found.tokens)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("cpu", None),
    ],
)
def test_cards_are_known_by_their_whole_name(device, expected):
    assert peak_flops(device) == expected

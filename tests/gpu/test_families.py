"""Every family in published widths, two layers of it, bf16 and NF4: patched against stock, both against fp32."""

import gc

import pytest
import torch
from test_fused_blocks import in_fp32

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS = 20
LOSS_TOLERANCE = 2e-3
# How much further than stock the patched gradients may be from those of an fp32 run.
GRADIENT_FACTOR = 1.1
# The widths are the published ones; a vocabulary of this size makes no difference to a layer.
COMMON = {"num_hidden_layers": 2, "vocab_size": 32768, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


def shape(kind, hidden, intermediate, heads, kv_heads, theta=1e6, **more):
    rope = {"rope_type": "default", "rope_theta": theta}
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_parameters": rope,
    }
    return kind, {**COMMON, **sizes, **more}


ALTERNATING = ["sliding_attention", "full_attention"]
MODELS = {
    "Llama-3.1-8B": shape("llama", 4096, 14336, 32, 8, rope_parameters=LLAMA3),
    "Llama-3.2-1B": shape("llama", 2048, 8192, 32, 8, head_dim=64, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "Mistral-7B": shape("mistral", 4096, 14336, 32, 8, head_dim=128, sliding_window=None),
    "Qwen2.5-7B": shape("qwen2", 3584, 18944, 28, 4),
    "Qwen3-8B": shape("qwen3", 4096, 12288, 32, 8, head_dim=128),
    "Gemma-7B": shape("gemma", 3072, 24576, 16, 16, theta=1e4, head_dim=256),
    "Gemma-2-9B": shape(
        "gemma2", 3584, 14336, 16, 8, theta=1e4, head_dim=256, query_pre_attn_scalar=256, layer_types=ALTERNATING
    ),
    "Gemma-3-4B": (
        "gemma3_text",
        {
            **COMMON,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 256,
            "layer_types": ALTERNATING,
        },
    ),
    "Phi-4": shape("phi3", 5120, 17920, 40, 10, theta=250000.0, sliding_window=None),
    "Phi-4-mini": shape(
        "phi3",
        3072,
        8192,
        24,
        8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    ),
    "Phi-2": shape(
        "phi",
        2560,
        10240,
        32,
        32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4},
    ),
}


def saved(folder, name):
    """A checkpoint of random bf16 weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def load(folder, quantised):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {"quantization_config": nf4} if quantised else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0}, **options)


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    # Targets by name, so that a quantised and a plain model get the same adapters.
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_up_proj", "gate_proj", "up_proj", "down_proj")
    wanted = [*linears, "dense", "fc1", "fc2"]
    targets = [name for name in wanted if any(key.endswith(name) for key, _ in model.named_modules())]
    return get_peft_model(
        model, LoraConfig(r=16, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    ).train()


def batch():
    return torch.randint(3, 32768, (2, 384), generator=torch.Generator().manual_seed(2)).cuda()


def loss_of(model, exact=False):
    """As Trainer computes it with bf16=True; or in the parameters' dtype."""
    with torch.autocast("cuda", torch.bfloat16, enabled=not exact):
        return model(input_ids=batch(), labels=batch(), use_cache=False).loss


def gradients(model, exact=False):
    loss_of(model, exact).backward()
    found = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def losses(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    found = []
    for _ in range(STEPS):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.detach())
    return torch.stack(found).tolist()


def distance(found, truth):
    """Relative distance of all gradients as one vector."""
    assert found.keys() == truth.keys()
    wrong = sum(float((found[name] - grad).norm()) ** 2 for name, grad in truth.items())
    return (wrong / sum(float(grad.norm()) ** 2 for grad in truth.values())) ** 0.5


@pytest.fixture
def counted(monkeypatch):
    """How often each fused op ran: a patch that always fell back would pass every comparison."""
    from sloth_plugins.patches.blocks import mlp_block
    from sloth_plugins.patches.kernels import ops

    counts = {}
    for name in ops.__all__:
        if not name.startswith("supports_"):
            real = getattr(ops, name)

            def counting(*args, name=name, real=real, **kwargs):
                counts[name] = counts.get(name, 0) + 1
                return real(*args, **kwargs)

            monkeypatch.setattr(ops, name, counting)
    whole = mlp_block.forward

    def block(*args, **kwargs):
        counts["block"] = counts.get("block", 0) + 1
        return whole(*args, **kwargs)

    monkeypatch.setattr(mlp_block, "forward", block)
    return counts


EXPECTED = {
    "phi": {"layer_norm", "apply_rotary", "activate"},
    "phi3": {"rms_norm", "apply_rotary", "glu_fused"},
    "qwen3": {"rms_norm", "qk_norm_rope", "glu"},
    "gemma3_text": {"rms_norm", "qk_norm_rope", "glu"},
}


@pytest.mark.parametrize("quantised", [False, True], ids=["bf16", "nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_patched_against_stock_and_both_against_fp32(name, quantised, tmp_path, counted):
    import sloth_plugins

    if quantised:
        pytest.importorskip("bitsandbytes")
    saved(tmp_path, name)
    model = lora(load(tmp_path, quantised))
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    start = {key: p.data.clone() for key, p in parameters.items()}

    def restart():
        for key, p in parameters.items():
            p.data.copy_(start[key])

    stock_losses = losses(model)
    restart()
    stock = gradients(model)
    patched = {}
    kernels = EXPECTED.get(MODELS[name][0], {"rms_norm", "apply_rotary", "glu"})
    # Of the norms the last one is in no block.
    for way, selection, off, wanted in (
        ("kernels", "1,-*:blocks", {"blocks"}, kernels),
        ("blocks", "1", set(), {"block", *kernels & {"rms_norm", "layer_norm"}}),
    ):
        counted.clear()
        report = sloth_plugins.patch(model, selection)
        assert {outcome.patch for outcome in report.outcomes if outcome.state == "off"} == off, report.outcomes
        assert {outcome.state for outcome in report.outcomes if outcome.patch not in off} == {"applied"}
        assert counted == {}
        grads = gradients(model)
        assert set(counted) == wanted
        patched[way] = grads, losses(model)
        restart()
        sloth_plugins.revert(model)
    truth = gradients(in_fp32(model), exact=True)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    theirs = distance(stock, truth)
    print(
        f"{name} {'nf4' if quantised else 'bf16'}: losses {stock_losses[0]:.3f} to {stock_losses[-1]:.3f}, {theirs:.2e}"
    )
    assert stock_losses[-1] < stock_losses[0]
    for way, (grads, found) in patched.items():
        worst = max(abs(a - b) / abs(b) for a, b in zip(found, stock_losses, strict=True))
        ours = distance(grads, truth)
        print(f"  {way}: losses within {worst:.1e}, gradients {ours:.2e} from fp32, stock's {theirs:.2e}")
        assert worst <= LOSS_TOLERANCE
        # Under autocast F.layer_norm gives fp32, and what four-bit layers make of that is added up in fp32 by upstream.
        wider = 1.25 if quantised and MODELS[name][0] == "phi" else GRADIENT_FACTOR
        assert ours <= wider * theirs

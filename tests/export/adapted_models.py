"""Tiny Llamas with adapters of every kind, saved and live, and what they should weigh in float64."""

import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def save_base(folder, *, dtype=torch.bfloat16, seed=0, shard="5GB", **config):
    torch.manual_seed(seed)
    values = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "initializer_range": 0.2,
    }
    model = LlamaForCausalLM(LlamaConfig(**values | config)).to(dtype)
    for bias in (p for n, p in model.named_parameters() if n.endswith("bias")):
        torch.nn.init.normal_(bias, std=0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def load(folder, quantised=None, dtype=torch.bfloat16):
    if quantised is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = BitsAndBytesConfig(**QUANTISED[quantised], bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=dtype)


def adapt(model, seed=1, name="default", **lora):
    """The model with an adapter whose every trained tensor is random, as after training."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | lora)
    if name == "default":
        model = get_peft_model(model, config)
    else:
        model.add_adapter(name, config)
        model.set_adapter(name)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def without(folder, *fields, **values):
    """Change an adapter's config."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in fields}))


def logits(model, length=17):
    ids = torch.randint(0, 100, (2, length), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids).logits.double()


def tokenizer():
    """A word-level tokenizer with a chat template."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "hello": 2, "world": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    made.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return made

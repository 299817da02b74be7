"""Tiny models on disk with a tokenizer of bytes, and text for them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tokenizer():
    """One token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def save_model(folder, *, dtype=torch.bfloat16, seed=0, shard="5GB", **config):
    """A random Llama whose layers and outputs differ enough for one to matter more than another."""
    torch.manual_seed(seed)
    values = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**values | config)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return folder


def ids(rows=3, length=24, seed=5):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model, rows=None):
    with torch.no_grad():
        return model(input_ids=ids() if rows is None else rows).logits.double()

"""Checkpoints of random weights in published shapes, in bf16 and in NF4.

    python -m training.models FOLDER NAME[:LAYERS] ...

NAME:LAYERS keeps so many layers and goes to FOLDER/NAME-LAYERS; what bitsandbytes has packed goes to a folder of the
same name with -nf4 behind it. A tokenizer is trained on Python's own modules.
"""

import sys
from pathlib import Path
from typing import Any

LLAMA_31 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def shape(kind: str, layers: int, hidden: int, inner: int, heads: tuple[int, int, int], vocabulary: int, **more: Any):
    queries, keys, size = heads
    return kind, layers, {
        "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": queries,
        "num_key_value_heads": keys, "head_dim": size, "vocab_size": vocabulary, **more,
    }  # fmt: skip


SHAPES = {
    "llama-8b": shape("llama", 32, 4096, 14336, (32, 8, 128), 128256, rope_parameters=LLAMA_31),
    "llama-1b": shape("llama", 16, 2048, 8192, (32, 8, 64), 128256, rope_parameters=LLAMA_31, tie_word_embeddings=True),
    "qwen2.5-7b": shape("qwen2", 28, 3584, 18944, (28, 4, 128), 152064, rope_parameters=rope(1e6)),
    "qwen3-8b": shape("qwen3", 36, 4096, 12288, (32, 8, 128), 151936, rope_parameters=rope(1e6)),
    "phi-4": shape(
        "phi3", 40, 5120, 17920, (40, 10, 128), 100352, rope_parameters=rope(250000.0), sliding_window=None,
        original_max_position_embeddings=16384,
    ),
    "gemma3-4b": shape("gemma3_text", 34, 2560, 10240, (8, 4, 256), 262208, sliding_window=1024),
    "gemma2-9b": shape(
        "gemma2", 42, 3584, 14336, (16, 8, 256), 256000, sliding_window=4096, query_pre_attn_scalar=256,
        rope_parameters=rope(1e4),
    ),
}  # fmt: skip
LONGEST = {"phi-4": 16384, "gemma2-9b": 8192}


def config_of(name: str, layers: int) -> Any:
    from transformers import AutoConfig

    kind, _, sizes = SHAPES[name]
    if kind == "gemma2":
        sizes = {**sizes, "layer_types": ["sliding_attention", "full_attention"] * (layers // 2)}
    if kind == "gemma3_text":
        kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)]
        sizes = {**sizes, "layer_types": kinds}
    return AutoConfig.for_model(
        kind, **sizes, num_hidden_layers=layers, max_position_embeddings=LONGEST.get(name, 131072),
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip


def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = ["<|begin|>", "<|end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    files = sorted(map(str, Path(sys.modules["os"].__file__ or "").parent.glob("*.py")))[:100]
    made.train(files, trainers.BpeTrainer(vocab_size=4096, special_tokens=marks, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=marks[0], eos_token=marks[1], pad_token=marks[2])


def write(folder: Path, name: str, layers: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(name, layers), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    del model
    packing = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    packed = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": device}, quantization_config=packing
    )
    packed.save_pretrained(f"{folder}-nf4", max_shard_size="4GB")
    for each in (folder, f"{folder}-nf4"):
        tokenizer().save_pretrained(each)


def main() -> None:
    for wanted in sys.argv[2:]:
        name, _, layers = wanted.partition(":")
        folder = Path(sys.argv[1]) / (f"{name}-{layers}" if layers else name)
        if not Path(f"{folder}-nf4").is_dir():
            write(folder, name, int(layers or SHAPES[name][1]))
            print("made", folder, flush=True)


if __name__ == "__main__":
    main()

"""Tokenizers trained on the spot, tiny models of every family, and text that they are tried on."""

import json
import random
import sysconfig
from functools import cache
from pathlib import Path

import gguf
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sloth_plugins.discovery import Plugins
from sloth_plugins.export.gguf import pre_tokenizers as known
from sloth_plugins.export.gguf.probe import PROBE

torch.set_num_threads(1)

FORMATS = {
    kind: spec.gguf
    for spec in Plugins(load_entry_points=False).architectures.values()
    if spec.gguf
    for kind in spec.model_types
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Rows of the embedding: more than the tokenizers have tokens, as in most real models.
ROWS = 1024
SCRIPTS = (
    "今天天气很好我们去公园吧中文分词测试。",
    "日本語のテキストをトークン化する。",
    "съешь же ещё этих мягких французских булок",
    "한국어 문장도 있습니다",
    "🦥🔥👍🏽👩‍👩‍👧‍👦🇩🇪 ∑∫√≠∞",
    "naïve café straße łódź ﬁne ½ ² Ⅳ",
)


@cache
def corpus() -> tuple[str, ...]:
    """Real code and prose, and a little of every script."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = ("json/decoder.py", "textwrap.py", "heapq.py", "statistics.py")
    lines = [line for name in files for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return (*lines, *(SCRIPTS * 20), *PROBE)


@cache
def mixed_lines(count: int = 2000, seed: int = 0) -> tuple[str, ...]:
    """Lines of code, prose, many scripts, odd spaces, CRLF, digits and special tokens, in NFC form."""
    import unicodedata

    draw = random.Random(seed)
    pieces = [line for line in corpus() if line.strip()]
    odd = ["  ", "\t", "\r\n", "\n\n", "\u00a0", "\u3000", "   \n ", "'s", "'LL", "1234567", "..", "/", "\\n", "\u200b"]
    letters = [chr(code) for code in (*range(0x20, 0x250), *range(0x370, 0x530), *range(0x4E00, 0x4F00))]
    result = []
    while len(result) < count:
        parts = draw.choices(pieces, k=draw.randint(1, 2)) + draw.choices(SCRIPTS, k=draw.randint(0, 1))
        parts += draw.choices(odd, k=draw.randint(0, 3)) + draw.choices(SPECIAL[1:], k=draw.randint(0, 1))
        # In one case, since llama.cpp's tekken and gpt-4o see capitals only in ASCII.
        parts += ["".join(draw.choices(letters, k=draw.randint(1, 8))).lower()]
        draw.shuffle(parts)
        result.append(unicodedata.normalize("NFC", draw.choice(["", " "]).join(parts)))
    return tuple(result)


BYTE_LEVEL = {name: (steps, ignore) for (steps, ignore), name in known.KNOWN.items()}
SENTENCEPIECE = ("always", "never", "first")


def byte_level(name: str, bos: bool = True, chat_template: str = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that splits as llama.cpp's `name` does."""
    steps, ignore_merges = BYTE_LEVEL[name]
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    parts = [
        pre_tokenizers.Digits(individual_digits=True)
        if step == known.DIGITS
        else pre_tokenizers.Split(Regex(step), behavior="isolated")
        for step in steps
    ]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.normalizer = normalizers.NFC() if name == "qwen2" else None
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(corpus(), trainer)
    return wrap(core, bos, chat_template)


def sentencepiece(
    prefix: str, bos: bool = True, chat_template: str = CHATML, rstrip: bool = False
) -> PreTrainedTokenizerFast:
    """BPE with byte fallback as transformers makes it of SentencePiece: every pair that is a token is a merge."""
    from tokenizers import AddedToken

    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fixed = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = [*map(chr, range(0x21, 0x7F))]
    trainer = trainers.BpeTrainer(
        vocab_size=960, special_tokens=fixed, initial_alphabet=alphabet, limit_alphabet=130, show_progress=False
    )
    trained.train_from_iterator(corpus(), trainer)
    vocab = trained.get_vocab()
    for run in ("▁▁", "▁▁▁▁"):
        vocab.setdefault(run, len(vocab))
    merges = []
    for text in sorted(set(vocab) - set(fixed), key=vocab.get):
        pairs = [(text[:at], text[at:]) for at in range(1, len(text))]
        merges += [(left, right) for left, right in pairs if left in vocab and right in vocab]
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prefix == "always":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif prefix == "never":
        core.normalizer = normalizers.Replace(" ", "▁")
        core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    kept = ("<unk>", "<s>", "<|endoftext|>")
    core.add_special_tokens([AddedToken(t, rstrip=rstrip and t not in kept, normalized=False) for t in SPECIAL])
    return wrap(core, bos, chat_template)


def wrap(core: Tokenizer, bos: bool, chat_template: str) -> PreTrainedTokenizerFast:
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": ROWS,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
    "unk_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
# What a family has of its own, so that leaving it out of the file would show.
OWN = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
    "mistral": {"sliding_window": None, "head_dim": 32},
    "ministral": {"sliding_window": 512},
    "qwen3": {"head_dim": 128, "tie_word_embeddings": True},
    "gemma": {"hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {"query_pre_attn_scalar": 64, "sliding_window": 32},
    "gemma3_text": {"query_pre_attn_scalar": 64, "sliding_window": 32, "num_hidden_layers": 3},
    "phi3": {"original_max_position_embeddings": 512, "sliding_window": None},
}
FAMILIES = tuple(FORMATS)


def tiny_model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    """A model with random weights, norms and biases: nothing is 0 or 1, where an error would not show."""
    torch.manual_seed(seed)
    values = {**SHAPE, **OWN.get(kind, {}), **changes}
    if kind == "gemma3_text":
        values.setdefault("layer_types", ["sliding_attention", "full_attention", "sliding_attention"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            if "embed_tokens" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.06)
    return model.to(dtype).eval()


def save_llama(path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama in bf16 with its tokenizer, as a merge leaves it."""
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "do_sample": True}))
    return path


def tensors(file):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def left_in(path):
    return sorted(entry.name for entry in path.iterdir()) if path.exists() else []

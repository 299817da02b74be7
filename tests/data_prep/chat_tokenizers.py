"""Small tokenizers with real chat templates, and one that nobody knows."""

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils as trl_templates

from sloth_plugins.data.templates import CHATML, MISTRAL, ZEPHYR

SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<think>", "</think>",
]  # fmt: skip
TEXT = [
    "user assistant system model tool Question: Answer: INST [/INST] def main(): return 'naïve'",
    "今天天气很好我们去公园吧。",
    "🦥🔥👍🏽👩‍👩‍👧‍👦",
    "съешь ещё этих мягких булок",
    "How are you? I am well, thank you.\n\nIndeed.",
]
UNKNOWN = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'Question: ' + m.content + '\n\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Answer: ' + m.content + '\n\n' }}"
    "{% else %}{{ 'Note (' + m.role + '): ' + m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
TAGGED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\\n' }}",
)
TEMPLATES = {
    "chatml": CHATML,
    "llama-3": trl_templates.llama3_chat_template,
    "gemma": trl_templates.gemma_chat_template,
    "phi-3": trl_templates.phi3_chat_template,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "qwen-3": trl_templates.qwen3_chat_template,
    "unknown": UNKNOWN,
    "tagged": TAGGED,
}
TOOLS = {"chatml", "llama-3", "zephyr", "qwen-3", "unknown"}  # may write a tool's message
VOCABULARIES = ("byte-level", "sentencepiece")


@cache
def core(vocabulary: str) -> str:
    """A vocabulary of letters, bytes and a few merges, as tokenizer.json."""
    if vocabulary == "byte-level":
        made = Tokenizer(models.BPE())
        split = r"'(?i:[sdmt])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(
            TEXT * 3, trainers.BpeTrainer(vocab_size=450, special_tokens=SPECIAL, initial_alphabet=alphabet)
        )
        return made.to_str()
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fixed = ["<unk>", *SPECIAL[:2], *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(TEXT[:1] * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=fixed))
    vocab = trained.get_vocab()
    merges = []
    for text in sorted(set(vocab) - set(fixed), key=vocab.get):
        pairs = [(text[:at], text[at:]) for at in range(1, len(text))]
        merges += [(left, right) for left, right in pairs if left in vocab and right in vocab]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # As Llama 2's: a space before every piece of text, also before one that follows a special token.
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return made.to_str()


def tokenizer(template: str | None = None, vocabulary: str = "byte-level") -> PreTrainedTokenizerFast:
    """A tokenizer with one of TEMPLATES, or with none."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(core(vocabulary)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = None if template is None else TEMPLATES[template]
    return made

"""Chat templates by name: for tokenizers without one, with the tokens that they need."""

import pytest
import torch
from chat_tokenizers import VOCABULARIES, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from sloth_plugins.chat_template import conversations, render
from sloth_plugins.data import get_chat_template
from sloth_plugins.data.answers import template_markers
from sloth_plugins.data.templates import TEMPLATES
from sloth_plugins.data.token_text import TokenText
from sloth_plugins.errors import SlothError

MESSAGES = [
    {"role": "system", "content": "要简短 🦥"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
]


def model(rows):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=rows, num_key_value_heads=2, **sizes))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_renders_and_tells_roles_apart(name, vocabulary):
    made = get_chat_template(tokenizer(None, vocabulary), name)
    assert made.eos_token == (TEMPLATES[name].end or "</s>")
    text = made.apply_chat_template(MESSAGES[1:], tokenize=False)
    assert "2 + 2?" in text
    markers = template_markers(TokenText(made))
    ids = made(text, add_special_tokens=False)["input_ids"]
    said = made.decode([id for id, kept in zip(ids, markers.mask(ids, TokenText(made)), strict=True) if kept])
    assert "4" in said.split("</think>")[-1].removesuffix(made.eos_token)
    assert "2 + 2?" not in said


def test_what_our_own_write():
    def text(name, **options):
        return get_chat_template(tokenizer(), name).apply_chat_template(MESSAGES, tokenize=False, **options)

    assert text("chatml", add_generation_prompt=True) == (
        "<|im_start|>system\n要简短 🦥<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text("zephyr") == "<|system|>\n要简短 🦥</s>\n<|user|>\n2 + 2?</s>\n<|assistant|>\n4</s>\n"
    assert text("mistral") == "<s>[INST] 要简短 🦥\n\n2 + 2? [/INST] 4</s>"


@pytest.mark.parametrize("name", ["llama-3", "llama3", "Llama_3", "LLAMA 3"])
def test_names_may_be_hyphenated_or_not(name):
    assert get_chat_template(tokenizer(), name).chat_template == get_chat_template(tokenizer(), "llama-3").chat_template


def test_a_tokenizer_keeps_its_own(capsys):
    made = tokenizer("gemma")
    before = made.chat_template, made.eos_token
    assert get_chat_template(made, "gemma") is made
    assert capsys.readouterr().err == ""
    get_chat_template(made, "chatml")
    assert (made.chat_template, made.eos_token) == before
    assert "keeps its own chat template, which is not 'chatml'; trl.clone_chat_template" in capsys.readouterr().err


def lacking():
    """A tokenizer that has no tokens of any chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, "</s>": 1, **{letter: n + 2 for n, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def test_tokens_that_are_not_there_are_added_to_both():
    made, network = lacking(), model(258)
    with pytest.raises(SlothError, match=r"needs <\|im_start\|>, <\|im_end\|>, .* give model=.* mistral, zephyr$"):
        get_chat_template(made, "chatml")
    assert made.chat_template is None
    rows = network.get_input_embeddings().weight.detach().clone()
    get_chat_template(made, "chatml", network)
    assert len(made("<|im_end|>")["input_ids"]) == 1
    assert made.eos_token == "<|im_end|>"
    assert network.config.eos_token_id == made.eos_token_id
    assert network.get_input_embeddings().num_embeddings >= 260
    assert torch.equal(network.get_input_embeddings().weight[:258], rows)
    ids = torch.tensor([made(render(made, MESSAGES), add_special_tokens=False)["input_ids"]])
    assert network(ids).logits.isfinite().all()


def test_templates_of_plain_text_need_no_tokens():
    made = get_chat_template(lacking(), "zephyr")
    assert len(made) == 258
    assert all(render(made, messages) for messages in conversations(system=True))


def test_names_of_another_form_are_for_the_rows():
    """A template reads role and content; what other loaders map in it, standardize_sharegpt maps in the rows."""
    with pytest.raises(SlothError, match=r"standardize_sharegpt\(dataset\) makes role, content, user and assistant"):
        get_chat_template(tokenizer(), "chatml", mapping={"role": "from", "content": "value", "user": "human"})
    same = {name: name for name in ("role", "content", "user", "assistant")}
    assert get_chat_template(tokenizer(), "chatml", mapping=same).chat_template


def test_an_unknown_name_names_the_known_ones():
    with pytest.raises(SlothError, match=r"no chat template 'chatlm' \(known: chatml, .*; did you mean 'chatml'\?$"):
        get_chat_template(tokenizer(), "chatlm")


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.sampled_from(VOCABULARIES))
def test_the_text_of_tokens_is_the_text(text, vocabulary):
    made = tokenizer(None, vocabulary)
    ids = made(text, add_special_tokens=False)["input_ids"]
    found, ends = TokenText(made).read(ids)
    assert found.encode("latin-1").decode().removeprefix(" " if vocabulary == "sentencepiece" else "") == text
    assert ends == sorted(ends)
    assert (ends or [0])[-1] == len(found)

"""Chat templates by name, for tokenizers that have none."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..chat_template import Unexpressible, conversations, render
from ..errors import SlothError, nearest
from ..processes import say

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant messages after the system message') }}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True, slots=True)
class Template:
    """Jinja, or the name under which TRL has it; the tokens it needs, and which of them ends a turn if not EOS."""

    jinja: str = ""
    trl: str = ""
    tokens: tuple[str, ...] = ()
    end: str | None = None


_CHATML = Template(tokens=("<|im_start|>", "<|im_end|>"), end="<|im_end|>")
_LLAMA = Template(tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), end="<|eot_id|>")
_GEMMA = Template(tokens=("<start_of_turn>", "<end_of_turn>"), end="<end_of_turn>")
_PHI = Template(tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), end="<|end|>")
TEMPLATES = {
    "chatml": replace(_CHATML, jinja=CHATML),
    "gemma": replace(_GEMMA, trl="gemma"),
    "gemma-3": replace(_GEMMA, trl="gemma3"),
    "llama-3": replace(_LLAMA, trl="llama3"),
    "llama-3.1": replace(_LLAMA, trl="llama3_1"),
    "llama-3.2": replace(_LLAMA, trl="llama3_2"),
    "mistral": Template(jinja=MISTRAL),
    "phi-3": replace(_PHI, trl="phi3"),
    "phi-3.5": replace(_PHI, trl="phi3_5"),
    "qwen-2.5": replace(_CHATML, trl="qwen2_5"),
    "qwen-3": replace(_CHATML, trl="qwen3"),
    "zephyr": Template(jinja=ZEPHYR),
}


def get_chat_template(
    tokenizer: Any, chat_template: str = "chatml", model: Any = None, mapping: Mapping[str, str] | None = None
) -> Any:
    """The tokenizer with the named chat template, if it had none; what ends a turn becomes its EOS.

    A tokenizer that has a chat template keeps it, since its model was trained by it, and a line says so where the
    named one writes otherwise; `trl.clone_chat_template` gives a model another one. Tokens that the vocabulary lacks
    are added if `model` is given, which then gets rows for them (by TRL); these must be trained too.

    Raises SlothError for an unknown name, for lacking tokens without a model, and for a `mapping` of role and content
    to other names, which rows are to have none of (`standardize_sharegpt`).
    """
    if any(name != given for name, given in (mapping or {}).items()):
        raise SlothError(
            f"mapping={dict(mapping or {})}: a chat template reads role and content; standardize_sharegpt(dataset) "
            "makes role, content, user and assistant of other names"
        )
    found = _named(chat_template)
    jinja = found.jinja or _of_trl(found.trl)
    if getattr(tokenizer, "chat_template", None):
        if not _same(tokenizer, jinja):
            say(
                f"the tokenizer keeps its own chat template, which is not {chat_template!r}; "
                "trl.clone_chat_template(model, tokenizer, source) gives a model another one"
            )
        return tokenizer
    known = tokenizer.get_vocab()
    lacking = [token for token in found.tokens if token not in known]
    if lacking and model is None:
        raise SlothError(
            f"the chat template {chat_template!r} needs {', '.join(lacking)}, which this tokenizer lacks; give model= "
            "to add them to both, or choose one that needs none: "
            + ", ".join(name for name, template in TEMPLATES.items() if not template.tokens)
        )
    made = copy.deepcopy(tokenizer)
    made.chat_template = jinja
    made.add_tokens(lacking, special_tokens=True)
    made.eos_token = found.end or made.eos_token
    try:
        render(made, list(conversations(system=False))[1])
    except Unexpressible as error:
        raise SlothError(f"the chat template {chat_template!r} does not suit this tokenizer: {error}") from None
    if lacking:
        _clone(model, tokenizer, made)
    tokenizer.chat_template, tokenizer.eos_token = jinja, made.eos_token
    return tokenizer


def _named(name: str) -> Template:
    """By its name, however it is hyphenated."""

    def plain(text: str) -> str:
        return "".join(letter for letter in text.lower() if letter.isalnum())

    known = {plain(key): template for key, template in TEMPLATES.items()}
    if plain(name) not in known:
        raise SlothError(
            f"no chat template {name!r} (known: {', '.join(TEMPLATES)}; trl.clone_chat_template(model, tokenizer, "
            f"source) takes that of any other model){nearest(name, TEMPLATES)}"
        )
    return known[plain(name)]


def _of_trl(name: str) -> str:
    try:
        from trl import chat_template_utils
    except ImportError:
        raise SlothError(
            "this chat template is TRL's, which is not installed: pip install 'sloth-plugins[trl]'"
        ) from None
    return str(getattr(chat_template_utils, f"{name}_chat_template"))


def _same(tokenizer: Any, jinja: str) -> bool:
    """Whether the tokenizer's own template writes what another one does."""
    other = copy.copy(tokenizer)
    other.chat_template = jinja
    try:
        return all(
            render(tokenizer, messages, generation=generation) == render(other, messages, generation=generation)
            for messages in conversations(system=False)
            for generation in (False, True)
        )
    except Unexpressible:
        return False


def _clone(model: Any, tokenizer: Any, source: Any) -> None:
    """Give model and tokenizer the tokens of `source`."""
    try:
        from trl import clone_chat_template
    except ImportError:
        raise SlothError(
            "adding tokens is TRL's work, which is not installed: pip install 'sloth-plugins[trl]'"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        source.save_pretrained(folder)
        clone_chat_template(model, tokenizer, folder)

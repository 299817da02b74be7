"""Modelfiles: the Go template renders what the chat template does, or there is none."""

import pytest
from go_templates import go, render, render_by_go
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sloth_plugins.errors import SlothError
from sloth_plugins.export import chat
from sloth_plugins.export.ollama import generation_of, go_template, modelfile, stops

BOS, EOS = "<s>", "</s>"
QWEN = (
    "{% if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role != 'system' %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n{{ system }}<|eot_id|>{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL3 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n'"
    " + m['content'] %}{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'"
    " + (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
BRACES = (
    "{% for m in messages %}{{ '{{' + m.role + '}}' + m.content + '{{end}}' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{{assistant}}' }}{% endif %}"
)
KNOWN = {
    "chatml": CHATML,
    "qwen": QWEN,
    "llama3": LLAMA3,
    "llama3.1": LLAMA31,
    "mistral": MISTRAL,
    "mistral-v3": MISTRAL3,
    "llama2": LLAMA2,
    "gemma": GEMMA,
    "gemma3": GEMMA3,
    "phi3": PHI3,
    "zephyr": ZEPHYR,
    "braces": BRACES,
}
NO_SYSTEM = {"mistral", "gemma"}
UNKNOWN = {
    "numbers its messages": "{% for m in messages %}{{ loop.index }}. {{ m.role }}: {{ m.content }}\n{% endfor %}",
    "writes one twice": "{% for m in messages %}{{ m.content }} {{ m.content }}\n{% endfor %}",
    "today's date": "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "keeps two": "{% for m in messages[-2:] %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "drops old thoughts": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' and not loop.nextitem"
        " is defined %}!{% endif %}{% if loop.index0 > 3 %} (late){% endif %}\n{% endfor %}"
    ),
    "refuses all": "{{ raise_exception('no') }}",
    None: None,
}
MARKS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|im_start|>", "<|user|>", "<|assistant|>")


def make_tokenizer(template):
    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator(["a b c d e"] * 3)
    core.add_special_tokens([BOS, EOS, *MARKS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS)
    tokenizer.chat_template = template
    return tokenizer


def dialogue(turns, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for n in range(turns):
        messages.append({"role": "user", "content": f'What is {n}?\nSay "it" with {{care}} & <b>'})
        if n + 1 < turns:
            messages.append({"role": "assistant", "content": f"It is {n}. 数字 🦥"})
    return messages


def cases(name):
    """Conversations with what the chat template renders of them; a system message that is missing is the default."""
    tokenizer = make_tokenizer(KNOWN[name])
    found = chat.read_format(tokenizer)
    for turns in (1, 2, 3, 5):
        for system in (None, "Be brief.\nAnd kind."):
            if system and name in NO_SYSTEM:
                continue
            messages = dialogue(turns, system)
            expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            given = system or found.default_system
            if given and not system:
                messages = [{"role": "system", "content": given}, *messages]
            yield {"template": go_template(found), "system": given, "messages": messages}, expected


@pytest.mark.parametrize("name", KNOWN)
def test_the_go_template_renders_what_the_chat_template_does(name):
    count = 0
    for case, expected in cases(name):
        assert render(**case) == expected
        count += 1
    assert count == (4 if name in NO_SYSTEM else 8)


@pytest.mark.skipif(go() is None, reason="no Go here; our evaluator of its templates stands in")
def test_go_itself_renders_the_same(tmp_path):
    both = [pair for name in KNOWN for pair in cases(name)]
    for found, (case, expected) in zip(render_by_go([case for case, _ in both], tmp_path), both, strict=True):
        assert found == expected == render(**case)


@pytest.mark.parametrize("reason", UNKNOWN)
def test_a_template_that_cannot_be_expressed_gives_none(reason):
    text, notes = modelfile("model.gguf", make_tokenizer(UNKNOWN[reason]), True, {})
    assert "TEMPLATE " not in text.replace("# No TEMPLATE", "")
    assert text.startswith("FROM ./model.gguf\n")
    assert len([note for note in notes if note.startswith("no TEMPLATE in the Modelfile: ")]) == 1
    assert all("\n" not in note for note in notes)


def test_what_the_formats_are():
    formats = {name: chat.read_format(make_tokenizer(template)) for name, template in KNOWN.items()}
    assert formats["qwen"].default_system == "You are a helpful assistant."
    assert formats["llama3.1"].always_system
    assert {name for name, found in formats.items() if found.system is None} == NO_SYSTEM
    assert {name: found.system_in for name, found in formats.items() if found.system_in != "place"} == {
        "mistral-v3": "last",
        "llama2": "first",
        "gemma3": "first",
    }
    assert formats["chatml"].assistant == chat.Around("<|im_start|>assistant\n", "<|im_end|>\n")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["<|im_end|>", EOS]),
        ("llama3", ["<|eot_id|>", EOS]),
        ("gemma", ["<end_of_turn>", EOS]),
        ("phi3", ["<|end|>", EOS]),
        ("mistral", [EOS]),
        ("zephyr", [EOS]),
        ("braces", [EOS]),
    ],
)
def test_an_answer_ends_at_the_turns_token_and_at_eos(name, expected):
    assert stops(make_tokenizer(KNOWN[name])) == expected


def test_the_whole_file():
    asked = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "do_sample": True, "top_k": None}
    text, notes = modelfile("model-q8_0.gguf", make_tokenizer(QWEN), True, asked)
    assert text == (
        "FROM ./model-q8_0.gguf\n"
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'SYSTEM """You are a helpful assistant."""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\n'
        "PARAMETER temperature 0.6\nPARAMETER top_p 0.9\nPARAMETER repeat_penalty 1.1\n"
    )
    assert notes == []


@pytest.mark.parametrize("name", ["llama3", "llama3.1", "mistral", "llama2", "gemma"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_is_written_once(name, add_bos):
    """llama.cpp puts it there where the file says so; then the template may not."""
    text, _ = modelfile("m.gguf", make_tokenizer(KNOWN[name]), add_bos, {})
    template = text.split('TEMPLATE """')[1]
    assert template.startswith(BOS) == (not add_bos and name != "llama2")
    first = render(template.split('"""')[0], "", dialogue(1))
    assert first.count(BOS) == (0 if add_bos and name != "llama2" else 1)


@pytest.mark.parametrize(("name", "told"), [("llama3", True), ("chatml", False)])
def test_stripped_spaces_are_told(name, told):
    _, notes = modelfile("m.gguf", make_tokenizer(KNOWN[name]), True, {})
    assert any("strips spaces" in note for note in notes) == told


def test_system_messages_that_are_left_out_are_told():
    _, notes = modelfile("m.gguf", make_tokenizer(GEMMA), True, {})
    assert any("takes no system message" in note for note in notes)


def test_thoughts_that_are_dropped_are_told():
    thinking = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    _, notes = modelfile("m.gguf", make_tokenizer(thinking), True, {})
    assert notes == ["the chat template drops the thoughts of earlier answers, which Ollama's does not"]


TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}{% if m.role == 'tool' %}{{ '<|im_start|>user\n"
    "<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_TOOLS = "the chat template writes tools, which the Modelfile's TEMPLATE leaves out, so Ollama refuses them"


@pytest.mark.parametrize(
    "template",
    [
        TOOLS,
        "{% if tools %}{{ raise_exception('one tool at a time') }}{% endif %}" + CHATML,
        {"default": CHATML, "tool_use": TOOLS},
    ],
)
def test_tools_that_are_left_out_are_told(template):
    text, notes = modelfile("m.gguf", make_tokenizer(template), True, {})
    assert notes == [NO_TOOLS]
    # By the variables of a template Ollama knows what it can do; without .Tools it answers that there are none.
    assert 'TEMPLATE """' in text
    assert ".Tools" not in text


@pytest.mark.parametrize("switch", ["enable_thinking is defined and enable_thinking is false", "enable_thinking"])
def test_a_switch_for_thinking_is_told(switch):
    stub = "{% if SWITCH %}{{ '<think>\n\n</think>\n\n' }}{% endif %}".replace("SWITCH", switch)
    thinking = CHATML.removesuffix("{% endif %}") + stub + "{% endif %}"
    text, notes = modelfile("m.gguf", make_tokenizer(thinking), True, {})
    assert notes == ["the chat template has enable_thinking; the Modelfile's TEMPLATE is as where that is not set"]
    assert "<think>" not in text


@pytest.mark.parametrize("text", ["{broken", "[1]", "3"])
def test_a_damaged_generation_config_is_one_line(tmp_path, text):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(SlothError, match=r"generation_config\.json cannot be read: .+; mend it, or remove it") as error:
        generation_of(tmp_path)
    assert "\n" not in str(error.value)

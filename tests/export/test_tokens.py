"""Tokenizers: llama.cpp makes the same tokens of 2,000 lines, or the export says why it would not."""

import itertools
import json
import re
import shutil
import unicodedata

import gguf
import gguf_tiny as tiny
import llama_runtime
import pytest
from fetch_llama_cpp import SOURCES
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from sloth_plugins.errors import SlothError
from sloth_plugins.export.gguf.probe import PROBE
from sloth_plugins.export.gguf.tokens import read_tokens
from sloth_plugins.export.gguf.vocabulary import TokenType
from sloth_plugins.export.gguf.writing import read_source, write

LINES = tiny.mixed_lines()
SPECIAL = re.compile("|".join(map(re.escape, tiny.SPECIAL)))


class OneLayer:
    """The weights of a model too small to matter: llama.cpp reads a tokenizer only from a model."""

    def __init__(self, rows=tiny.ROWS):
        small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "rope_parameters": None}
        model = tiny.tiny_model("llama", vocab_size=rows, **small)
        self.config, self._tensors = model.config, model.state_dict()

    def shapes(self):
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name):
        return self._tensors[name].clone()


@pytest.fixture(scope="module")
def weights():
    return OneLayer()


@pytest.fixture
def loaded(weights, tmp_path):
    """Write a tokenizer into a file, and llama.cpp's model of it."""
    llama_runtime.require()
    opened = []

    def load(tokenizer):
        file = tmp_path / f"{len(opened)}.gguf"
        write(read_source(weights, tokenizer, "tiny"), file, "f16")
        opened.append(llama_runtime.Llama(file))
        return opened[-1]

    yield load
    for model in opened:
        model.__exit__()


def differing(model, tokenizer, lines=LINES):
    return [line for line in lines if model.tokenize(line) != tokenizer(line, add_special_tokens=False)["input_ids"]]


def test_the_lines_hold_what_they_should():
    text = "\n".join(LINES)
    assert len(LINES) == len(set(LINES)) == 2000
    for needle in ("\r\n", "def ", "天气", "🦥", "<|im_end|>", "\u3000", "  ", "\t", "한국어"):
        assert text.count(needle) >= 50, needle
    assert unicodedata.is_normalized("NFC", text)
    assert unicodedata.is_normalized("NFC", "".join(PROBE))


@pytest.mark.parametrize(("name", "bos"), [(name, i % 2 == 0) for i, name in enumerate(tiny.BYTE_LEVEL)])
def test_byte_level(loaded, name, bos):
    tokenizer = tiny.byte_level(name, bos=bos)
    model = loaded(tokenizer)
    assert differing(model, tokenizer) == []
    assert differing(model, tokenizer, PROBE) == []
    assert model.tokenize("Hello", add_special=True) == tokenizer("Hello")["input_ids"]


@pytest.mark.parametrize("prefix", ["always", "never"])
def test_sentencepiece(loaded, prefix):
    tokenizer = tiny.sentencepiece(prefix)
    model = loaded(tokenizer)
    assert differing(model, tokenizer) == []
    assert differing(model, tokenizer, PROBE) == []
    assert model.tokenize("Hello", add_special=True) == tokenizer("Hello")["input_ids"]


def test_a_space_at_the_start_only_is_as_it_is_for_chats(loaded):
    tokenizer = tiny.sentencepiece("first")
    chats = [f"<|im_start|>{line}" for line in LINES]
    assert differing(loaded(tokenizer), tokenizer, chats) == []
    notes = read_tokens(tokenizer, tiny.ROWS).notes
    assert notes == [
        "llama.cpp puts a space before no text, where this tokenizer puts one at the start of a text that does not "
        "start with a special token"
    ]


def test_and_as_it_is_for_plain_text_without_a_chat_template(loaded):
    tokenizer = tiny.sentencepiece("first", chat_template=None)
    plain = [line for line in LINES if not SPECIAL.search(line) and not line.startswith(" ")]
    assert len(plain) > 500
    assert differing(loaded(tokenizer), tokenizer, plain) == []
    assert len(read_tokens(tokenizer, tiny.ROWS).notes) == 2


def test_spaces_after_special_tokens_go_as_phi3_has_it(loaded):
    tokenizer = tiny.sentencepiece("always", rstrip=True)
    tokens = read_tokens(tokenizer, tiny.ROWS)
    assert tokens.name == "Phi-3"
    # llama.cpp drops the spaces of ASCII only.
    lines = [line for line in LINES if not re.search(rf"({SPECIAL.pattern})\s*[\u00a0\u3000]", line)]
    assert sum(bool(re.search(rf"({SPECIAL.pattern})\s", line)) for line in lines) > 100
    assert differing(loaded(tokenizer), tokenizer, lines) == []


def test_other_stripping_is_told():
    tokenizer = tiny.byte_level("gpt-2")
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    next(token for token in core["added_tokens"] if token["content"] == "<|im_end|>")["rstrip"] = True
    tokens = read_tokens(tiny.wrap(Tokenizer.from_str(json.dumps(core)), True, tiny.CHATML), tiny.ROWS)
    assert tokens.name is None
    assert tokens.notes == ["llama.cpp keeps the spaces beside <|im_end|>, which this tokenizer drops"]


def test_added_tokens_are_taken_whole(loaded):
    for tokenizer in (tiny.byte_level("qwen2"), tiny.sentencepiece("never")):
        tokenizer.add_tokens(["<think>", "</think>", "foo bar"])
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
        model = loaded(tokenizer)
        lines = [f"a<think>b c</think> d foo bar<|tool|>{line}" for line in LINES[:200]]
        assert differing(model, tokenizer, lines) == []
        tokens = read_tokens(tokenizer, tiny.ROWS).vocabulary
        kinds = dict(zip(tokens.texts, tokens.types, strict=True))
        assert kinds["<think>"] == TokenType.USER_DEFINED
        assert kinds["<|tool|>"] == TokenType.CONTROL


def test_rows_without_a_token_are_unused():
    tokenizer = tiny.byte_level("gpt-2")
    vocabulary = read_tokens(tokenizer, tiny.ROWS).vocabulary
    count = len(tokenizer)
    assert len(vocabulary.texts) == tiny.ROWS > count
    assert set(vocabulary.types[count:]) == {TokenType.UNUSED}
    assert len(set(vocabulary.texts)) == tiny.ROWS
    with pytest.raises(SlothError, match=rf"{count} tokens and the model's embedding 700 rows"):
        read_tokens(tokenizer, 700)


def test_special_tokens_and_what_is_added_around():
    tokens = read_tokens(tiny.sentencepiece("always"), tiny.ROWS)
    assert tokens.special == {"bos": 1, "eos": 2, "unk": 0}
    assert (tokens.add_bos, tokens.add_eos) == (True, False)
    assert read_tokens(tiny.sentencepiece("always", bos=False), tiny.ROWS).add_bos is False


def changed(tokenizer, change):
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    change(core)
    return tiny.wrap(Tokenizer.from_str(json.dumps(core)), False, tiny.CHATML)


def set_regex(core, regex):
    core["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = regex


def move_a_merge(merges):
    """Of a token that two merges make, the second goes to the end."""
    joined = ["".join(merge) for merge in merges]
    at = next(n for n in range(1, len(joined)) if joined[n] == joined[n - 1])
    merges.append(merges.pop(at))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A tokenizer.model that SentencePiece itself has trained, and SentencePiece's reading of it."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text").write_text("\n".join(line.replace("\n", " ") for line in tiny.corpus()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    return folder / "tokenizer.model", sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))


@pytest.mark.parametrize("kind", ["Llama", "Gemma"])
def test_a_model_file_of_sentencepiece(loaded, model_file, tmp_path, kind):
    file, trained = model_file
    folder = tmp_path / kind
    folder.mkdir()
    shutil.copyfile(file, folder / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": f"{kind}Tokenizer", **names}))
    (folder / "config.json").write_text(json.dumps({"model_type": kind.lower()}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = loaded(tokenizer)
    plain = [line for line in LINES if not SPECIAL.search(line)]
    assert len(plain) > 500
    if kind == "Gemma":
        assert differing(model, tokenizer, plain) == []
        return
    # transformers 5 puts no space before a text that starts with one; SentencePiece does, and so does llama.cpp.
    assert [line for line in plain if model.tokenize(line) != trained.encode(line)] == []
    assert differing(model, tokenizer, [line for line in plain if not line.startswith(" ")]) == []


def test_every_name_of_a_pre_tokenizer_is_llama_cpp_s(weights, tmp_path):
    llama_runtime.require()
    source = read_source(weights, tiny.byte_level("gpt-2"), "tiny")

    def load(name):
        source.tokens.vocabulary.pre = name
        write(source, tmp_path / "file.gguf", "f16")
        llama_runtime.Llama(tmp_path / "file.gguf").__exit__()

    assert set(tiny.known.KNOWN.values()) < set(tiny.known.NAMES)
    for name in tiny.known.NAMES:
        load(name)
    with pytest.raises(AssertionError, match="unknown pre-tokenizer type: 'nosuch'"):
        load("nosuch")


class TestRefusals:
    def test_a_pre_tokenizer_that_nobody_knows(self):
        with pytest.raises(SlothError, match="knows no pre-tokenizer 'tekkin'; did you mean 'tekken'"):
            tiny.known.require_known("tekkin")

    def test_an_unknown_pre_tokenizer_names_what_was_found_and_what_is_near(self):
        regex = r"\p{N}{1,2}| ?\p{L}+|[^\p{L}\p{N}]+"
        odd = changed(tiny.byte_level("qwen2"), lambda core: set_regex(core, regex))
        with pytest.raises(SlothError) as error:
            read_tokens(odd, tiny.ROWS)
        message = str(error.value)
        assert regex in message
        assert "\n" not in message
        lines = re.search(r"nearest is '([\w.-]+)', which splits (\d+) of 12 lines", message)
        assert lines
        assert 0 <= int(lines[2]) < 12
        assert f"pre_tokenizer={lines[1]!r}" in message

    def test_another_spelling_is_found_to_split_the_same_and_taken_when_named(self):
        spelled = f"(?:{tiny.known.QWEN2})"
        odd = changed(tiny.byte_level("qwen2"), lambda core: set_regex(core, spelled))
        with pytest.raises(SlothError, match="nearest is 'qwen2', which splits 12 of 12 lines of real text the same"):
            read_tokens(odd, tiny.ROWS)
        assert read_tokens(odd, tiny.ROWS, pre_tokenizer="qwen2").vocabulary.pre == "qwen2"

    def test_ignored_merges_are_part_of_the_name(self):
        odd = changed(tiny.byte_level("tekken"), lambda core: core["model"].update(ignore_merges=False))
        with pytest.raises(SlothError, match="ignore_merges=False; nearest is 'tekken', which splits 12 of 12 lines"):
            read_tokens(odd, tiny.ROWS)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda core: core.update(normalizer={"type": "Lowercase"}), "does not normalise text.*Lowercase"),
            (lambda core: core["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True), "no pre-tokenizer"),
            (lambda core: core["added_tokens"][5].update(single_word=True), "whole words"),
            (lambda core: core["model"].update(end_of_word_suffix="</w>"), "no end_of_word_suffix"),
        ],
    )
    def test_byte_level(self, change, words):
        with pytest.raises(SlothError, match=words):
            read_tokens(changed(tiny.byte_level("gpt-2"), change), tiny.ROWS)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda core: core["model"].update(byte_fallback=False), "needs byte fallback"),
            (lambda core: core["model"]["merges"].pop(), "and no merge joins them"),
            (lambda core: move_a_merge(core["model"]["merges"]), "at two ranks"),
            (lambda core: core["normalizer"]["normalizers"].insert(0, {"type": "NFKC"}), "does not normalise.*NFKC"),
            (lambda core: core["normalizer"]["normalizers"].pop(), "does not write spaces as"),
            (lambda core: core.update(pre_tokenizer={"type": "Whitespace"}), "does not split text.*Whitespace"),
        ],
    )
    def test_sentencepiece(self, change, words):
        with pytest.raises(SlothError, match=words):
            read_tokens(changed(tiny.sentencepiece("always"), change), tiny.ROWS)

    def test_splitting_where_tokens_reach_over_spaces(self):
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        odd = changed(tiny.sentencepiece("always"), lambda core: core.update(normalizer=None, pre_tokenizer=metaspace))
        with pytest.raises(SlothError, match="over a space, where this tokenizer splits"):
            read_tokens(odd, tiny.ROWS)

    def test_other_kinds(self):
        core = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
        with pytest.raises(SlothError, match="WordPiece tokenizers are not exported"):
            read_tokens(tiny.wrap(core, False, tiny.CHATML), tiny.ROWS)

    def test_something_else_around_a_text(self):
        from tokenizers import processors

        tokenizer = tiny.byte_level("gpt-2")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 4)]
        )
        with pytest.raises(SlothError, match="adds BOS and EOS at most"):
            read_tokens(tokenizer, tiny.ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_real_vocabularies_come_back_as_llama_cpp_has_them(name):
    """transformers makes a tokenizer.json of each; ours gives the tokens, their types and the order of scores back."""
    llama_runtime.require()
    file = f"ggml-vocab-{name}.gguf"
    fields = gguf.GGUFReader(SOURCES / "models" / file)
    texts, types, scores = (
        fields.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "token_type", "scores")
    )
    found = read_tokens(AutoTokenizer.from_pretrained(SOURCES / "models", gguf_file=file), len(texts)).vocabulary
    assert found.texts == texts
    # Their phi-3 has <unk> as a control token; what fills up the rows came back from transformers as added tokens.
    known = [n for n, text in enumerate(texts) if text != "<unk>" and not text.startswith("[PAD")]
    assert [int(found.types[n]) for n in known] == [types[n] for n in known]
    # Runs of spaces share the lowest score; the order among them is that of their merges.
    merged = [n for n in known if types[n] == TokenType.NORMAL and len(texts[n]) > 1]
    runs = [n for n in merged if set(texts[n]) == {"▁"}]
    by_theirs = sorted(set(merged) - set(runs), key=lambda n: -scores[n])
    ours = [found.scores[n] for n in by_theirs]
    assert len(ours) > 25000
    assert all(a > b for a, b in itertools.pairwise(ours))
    assert max(found.scores[n] for n in runs) < ours[-1]

"""Loss on answers alone: by templates and by markers, on text that was tokenised, cut and packed."""

from itertools import chain, groupby
from types import SimpleNamespace

import pytest
from chat_tokenizers import TEMPLATES, TOOLS, VOCABULARIES, tokenizer
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

from sloth_plugins.data import train_on_responses_only
from sloth_plugins.data.responses import Answers
from sloth_plugins.errors import SlothError

# Every role has letters of its own, so that a text shows who speaks; between them stands what all may say.
LETTERS = {"user": "λβγδ你好🦥", "assistant": "жшщц今天🔥", "system": "ÀÉÎ公园", "tool": "ñøå山水👍"}
SHARED = " \n.,:<|#[]"
ANSWERS = {
    (name, vocabulary): Answers(tokenizer(name, vocabulary), None, None)
    for name in TEMPLATES
    for vocabulary in VOCABULARIES
}


def content(role):
    letters = st.sampled_from(LETTERS[role])
    return st.builds("{}{}{}".format, letters, st.text(LETTERS[role] + SHARED, max_size=10), letters)


@st.composite
def dialogues(draw, name):
    messages = []
    if name not in ("gemma", "mistral") and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(content("system"))})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(content("user"))})
        messages.append({"role": "assistant", "content": draw(content("assistant"))})
        if name in TOOLS and draw(st.booleans()):
            messages.append({"role": "tool", "content": draw(content("tool"))})
            messages.append({"role": "assistant", "content": draw(content("assistant"))})
    return messages


def tokens_of(made, messages, generation=False):
    text = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    return made(text, add_special_tokens=False)["input_ids"]


def trained(made, row):
    """The texts of the runs of tokens that have labels."""
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    assert all(label in (-100, id) for id, label in pairs)
    runs = groupby(pairs, key=lambda pair: pair[1] != -100)
    return [made.decode([id for id, _ in run]) for kept, run in runs if kept]


def only(role, text):
    return "".join(letter for letter in text if letter in LETTERS[role])


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_all_of_the_answers_and_nothing_else(name, vocabulary, data):
    answers = ANSWERS[name, vocabulary]
    packed = data.draw(st.lists(dialogues(name), min_size=1, max_size=3))
    ids = [tokens_of(answers.tokenizer, messages) for messages in packed]
    row = {"input_ids": list(chain(*ids)), "seq_lengths": [len(part) for part in ids]}
    found = answers.labels(row)
    said = "".join(trained(answers.tokenizer, row | found))
    spoken = [message for messages in packed for message in messages]
    assert only("assistant", said) == only(
        "assistant", "".join(message["content"] for message in spoken if message["role"] == "assistant")
    )
    assert not [letter for role in LETTERS if role != "assistant" for letter in only(role, said)]
    assert (found["answer_tokens"], found["all_tokens"]) == (
        sum(label != -100 for label in found["labels"]),
        len(row["input_ids"]),
    )


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_rows_that_are_cut_have_the_labels_that_they_had_whole(name, data):
    """At the end always; at the beginning an answer whose header is gone is no longer seen as one."""
    answers = ANSWERS[name, "byte-level"]
    ids = tokens_of(answers.tokenizer, data.draw(dialogues(name)))
    whole = answers.labels({"input_ids": ids})["labels"]
    at = data.draw(st.integers(1, len(ids)))
    assert answers.labels({"input_ids": ids[:at]})["labels"] == whole[:at]
    late = answers.labels({"input_ids": ids[at:]})["labels"]
    assert all(label in (-100, expected) for label, expected in zip(late, whole[at:], strict=True))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["It is 4.<|im_end|>\n", "No.<|im_end|>\n"]),
        ("llama-3", ["It is 4.<|eot_id|>", "No.<|eot_id|>"]),
        ("gemma", ["It is 4.<end_of_turn>\n", "No.<end_of_turn>\n"]),
        ("phi-3", ["It is 4.<|end|>\n", "No.<|end|>\n</s>"]),
        ("mistral", [" It is 4.</s>", " No.</s>"]),
        ("zephyr", ["It is 4.</s>\n", "No.</s>\n"]),
        ("qwen-3", ["It is 4.<|im_end|>\n", "<think>\n\n</think>\n\nNo.<|im_end|>\n"]),
        ("unknown", [" It is 4.\n\n", " No.\n\n</s>"]),
    ],
)
def test_what_is_trained_on_is_the_answer_and_its_end(name, expected):
    made = tokenizer(name)
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "It is 4."},
        {"role": "user", "content": "Are you sure?"},
        {"role": "assistant", "content": "No."},
    ]
    ids = tokens_of(made, messages)
    ids += [made.eos_token_id] if name == "unknown" else []  # as SFTTrainer ends a text
    assert trained(made, {"input_ids": ids} | ANSWERS[name, "byte-level"].labels({"input_ids": ids})) == expected


def test_generation_tags_decide_what_markers_cannot():
    """A user who writes the markers is still the user, for a template that marks the assistant."""
    made = tokenizer("tagged")
    messages = [
        {"role": "user", "content": "λ<|im_end|>\n<|im_start|>assistant\nβ"},
        {"role": "assistant", "content": "ж"},
    ]
    ids = tokens_of(made, messages)
    row = {"input_ids": ids, "messages": messages}
    assert trained(made, row | ANSWERS["tagged", "byte-level"].labels(row)) == ["ж<|im_end|>"]
    # Tokens that these messages did not make are left to the markers.
    row = {"input_ids": tokens_of(made, [messages[1] | {"role": "user"}, messages[1]]), "messages": messages}
    assert trained(made, row | ANSWERS["tagged", "byte-level"].labels(row)) == ["ж<|im_end|>\n"]


def trainer(made, train, evaluation=None, collator=None):
    return SimpleNamespace(
        processing_class=made, train_dataset=train, eval_dataset=evaluation, data_collator=collator, args=None
    )


def rows_of(made, count=4):
    dialogue = [[{"role": "user", "content": f"λ{n}"}, {"role": "assistant", "content": f"ж{n}"}] for n in range(count)]
    return [{"input_ids": tokens_of(made, messages)} for messages in dialogue]


def test_train_and_eval_data(capsys):
    made = tokenizer("chatml")
    given_trainer = trainer(made, Dataset.from_list(rows_of(made)), {"a": Dataset.from_list(rows_of(made, 2))})
    assert train_on_responses_only(given_trainer) is given_trainer
    assert given_trainer.train_dataset.column_names == ["input_ids", "labels"]
    assert [trained(made, row) for row in given_trainer.train_dataset] == [[f"ж{n}<|im_end|>\n"] for n in range(4)]
    assert [trained(made, row) for row in given_trainer.eval_dataset["a"]] == [[f"ж{n}<|im_end|>\n"] for n in range(2)]
    said = capsys.readouterr().err
    assert "train data: loss on the answers alone, " in said
    assert "[...]ж0<|im_end|>\n" in said
    assert "eval data" in said


def test_streaming_data():
    made = tokenizer("chatml")
    streaming = IterableDataset.from_generator(lambda: iter([{"input_ids": [5, 6]}, *rows_of(made)]))
    found = list(train_on_responses_only(trainer(made, streaming)).train_dataset)
    assert [trained(made, row) for row in found] == [[f"ж{n}<|im_end|>\n"] for n in range(4)]
    assert found[0].keys() == {"input_ids", "labels"}


def test_rows_without_an_answer_are_left_out_and_labels_only_shrink(capsys):
    made = tokenizer("chatml")
    rows = [row | {"labels": [*row["input_ids"][:-1], -100]} for row in rows_of(made)]
    rows.insert(1, {"input_ids": [5, 6, 7], "labels": [5, 6, 7]})
    data = train_on_responses_only(trainer(made, Dataset.from_list(rows))).train_dataset
    assert [trained(made, row) for row in data] == [[f"ж{n}<|im_end|>"] for n in range(4)]
    assert "1 of 5 rows have no answer and are left out" in capsys.readouterr().err


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_markers_of_ones_own(vocabulary):
    made = tokenizer(None, vocabulary)
    text = "### Instruction:\nλ\n\n### Response:\nж\n\n### Instruction:\nβ\n\n### Response:\nш</s>"
    data = Dataset.from_list([{"input_ids": made(text)["input_ids"]}])
    found = train_on_responses_only(trainer(made, data), "### Instruction:\n", "### Response:\n").train_dataset
    assert trained(made, found[0]) == ["ж\n\n", "ш</s>"]


def test_a_collator_that_makes_labels_is_replaced():
    made = tokenizer("chatml")
    collator = DataCollatorForLanguageModeling(made, mlm=False)
    found = train_on_responses_only(trainer(made, Dataset.from_list(rows_of(made)), collator=collator))
    assert isinstance(found.data_collator, DataCollatorForSeq2Seq)
    batch = found.data_collator([found.train_dataset[n] for n in range(2)])
    assert [row.tolist() for row in batch["labels"]] == [found.train_dataset[n]["labels"] for n in range(2)]


def test_the_names_are_imported_without_torch():
    import subprocess
    import sys

    code = "import sys; from sloth_plugins.data import *; print({'torch', 'datasets', 'trl'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


NUMBERED = "{% for m in messages %}{{ loop.index }}. {{ m.role }}: {{ m.content }}\n{% endfor %}"
BARE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("streaming", [False, True])
def test_it_refuses_to_mask_everything(streaming):
    made = tokenizer("llama-3")
    data = Dataset.from_list(rows_of(tokenizer("chatml")))
    data = data.to_iterable_dataset() if streaming else data
    given_trainer = trainer(made, data)
    with pytest.raises(
        SlothError, match=r"nothing of the train data would be trained on: .*assistant.* begins no answer"
    ):
        train_on_responses_only(given_trainer)
    assert given_trainer.train_dataset is data


def test_rows_that_are_cut_before_every_answer_are_told_as_such():
    made = tokenizer("chatml")
    cut = [{"input_ids": row["input_ids"][:2]} for row in rows_of(made)]
    with pytest.raises(SlothError, match=r", or give a larger max_length, if rows are cut before their answers$"):
        train_on_responses_only(trainer(made, Dataset.from_list(cut)))


@pytest.mark.parametrize("template", [NUMBERED, BARE, None, "{{ raise_exception('no') }}"])
def test_templates_that_tell_nobody_apart_need_markers(template):
    made = tokenizer()
    made.chat_template = template
    data = Dataset.from_list(rows_of(tokenizer("chatml")))
    with pytest.raises(SlothError, match=r"answers cannot be told from the rest: .*; give instruction_part"):
        train_on_responses_only(trainer(made, data))
    found = train_on_responses_only(trainer(made, data), "<|im_start|>user\n", "<|im_start|>assistant\n")
    assert trained(made, found.train_dataset[0]) == ["ж0<|im_end|>\n"]


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ({}, ("<|im_start|>user\n",), "belong together"),
        ({"processing_class": None}, (), "no tokenizer"),
        ({"train_dataset": None}, (), "has no data"),
        ({"train_dataset": Dataset.from_list([{"text": "a"}])}, (), r"not tokenised \(columns: text\)"),
        ({"train_dataset": Dataset.from_list([{"input_ids": [5]}]).select([])}, (), "nothing: there are no rows"),
    ],
)
def test_mistakes_are_one_line(change, arguments, said):
    made = tokenizer("chatml")
    given_trainer = trainer(made, Dataset.from_list(rows_of(made)))
    vars(given_trainer).update(change)
    with pytest.raises(SlothError, match=said):
        train_on_responses_only(given_trainer, *arguments)

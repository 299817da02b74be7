"""Dialogues of single-turn rows: nothing lost, nothing repeated, the same by the same seed, streaming too."""

from collections import Counter

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from sloth_plugins.data import to_sharegpt
from sloth_plugins.errors import SlothError

PROMPT = "{instruction}[[\nInput: {input}]]"
TEXT = st.text(min_size=1, max_size=8).filter(lambda text: text.strip() and text.isprintable())


def rows(count):
    return [
        {"instruction": f"Q{n} 问题", "input": f"in{n}" if n % 2 else "", "output": f"A{n} 🦥"} for n in range(count)
    ]


def pairs(dialogue):
    turns = dialogue["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    return [(turns[n]["value"], turns[n + 1]["value"]) for n in range(0, len(turns), 2)]


def test_one_row_is_one_dialogue_in_its_order():
    found = to_sharegpt(Dataset.from_list(rows(2)), PROMPT)
    assert found.column_names == ["conversations"]
    assert [pairs(row) for row in found] == [[("Q0 问题", "A0 🦥")], [("Q1 问题\nInput: in1", "A1 🦥")]]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**31), st.booleans())
def test_every_row_is_in_one_dialogue_once(count, extension, seed, streaming):
    data = Dataset.from_list(rows(count))
    data = data.to_iterable_dataset(num_shards=min(3, count)) if streaming else data
    found = [pairs(row) for row in to_sharegpt(data, PROMPT, conversation_extension=extension, random_state=seed)]
    expected = Counter(
        answer for _, answer in (pair for row in to_sharegpt(Dataset.from_list(rows(count))) for pair in pairs(row))
    )
    assert Counter(answer for dialogue in found for _, answer in dialogue) == expected
    assert max(expected.values()) == 1
    assert [len(dialogue) for dialogue in found] == [extension] * (count // extension) + (
        [count % extension] if count % extension else []
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_the_seed_decides(streaming):
    data = Dataset.from_list(rows(60))
    data = data.to_iterable_dataset(num_shards=2) if streaming else data

    def made(seed, **options):
        return [pairs(row) for row in to_sharegpt(data, PROMPT, random_state=seed, **options)]

    assert made(1, conversation_extension=4) == made(1, dialogue_extension=4)
    assert made(1, conversation_extension=4) != made(2, conversation_extension=4)
    assert [answer for dialogue in made(1, conversation_extension=4) for _, answer in dialogue] != [
        row["output"] for row in rows(60)
    ]


def test_streaming_reads_no_more_than_it_must():
    read = []

    def source():
        for row in rows(50):
            read.append(row)
            yield row

    first = next(iter(to_sharegpt(IterableDataset.from_generator(source), PROMPT)))
    assert pairs(first) == [("Q0 问题", "A0 🦥")]
    assert len(read) < 50


def test_every_split():
    found = to_sharegpt(DatasetDict(train=Dataset.from_list(rows(4)), test=Dataset.from_list(rows(3))), PROMPT)
    assert {name: len(split) for name, split in found.items()} == {"train": 4, "test": 3}


@settings(max_examples=40, deadline=None)
@given(instruction=TEXT, extra=st.one_of(st.none(), st.just(" "), TEXT), answer=TEXT)
def test_texts_come_through_as_they_are(instruction, extra, answer):
    data = Dataset.from_dict({"instruction": [instruction], "input": [extra], "output": [answer]})
    ((question, given_answer),) = pairs(to_sharegpt(data, "<{instruction}>[[ ({input}, {{}})]]!")[0])
    assert given_answer == answer
    assert question == f"<{instruction}>" + (f" ({extra}, {{}})" if extra and extra.strip() else "") + "!"


def test_numbers_are_written_and_columns_may_have_any_name():
    data = Dataset.from_dict({"Input Text": ["2 + 2"], "标签": [4]})
    assert pairs(to_sharegpt(data, "{Input Text} = ?", "标签")[0]) == [("2 + 2 = ?", "4")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"merged_prompt": "{instrution}"}, "names 'instrution', which is no column; did you mean 'instruction'"),
        ({"merged_prompt": "no column"}, "names no column"),
        ({"merged_prompt": "{instruction}[[ always]]"}, "names no column"),
        ({"merged_prompt": "{instruction}[[{input}"}, "without its other half"),
        ({"merged_prompt": "{instruction"}, "cannot be read"),
        ({"merged_prompt": "{}{instruction}"}, "names ''"),
        ({"output_column_name": "ouput"}, "no column 'ouput' to answer with; did you mean 'output'"),
        ({"conversation_extension": 0}, "1 or more, not 0"),
        ({"conversation_extension": 2, "dialogue_extension": 3}, "one setting"),
    ],
)
def test_mistakes_are_one_line(options, said):
    with pytest.raises(SlothError) as caught:
        to_sharegpt(Dataset.from_list(rows(2)), **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_answer_is_named():
    data = Dataset.from_list([*rows(2), {"instruction": "Q", "input": "", "output": " "}])
    with pytest.raises(SlothError, match=r"row 2 \(the first is 0\) has an empty 'output'"):
        to_sharegpt(data, PROMPT)
    with pytest.raises(SlothError, match=r"Dataset\.from_list"):
        to_sharegpt(rows(2), PROMPT)

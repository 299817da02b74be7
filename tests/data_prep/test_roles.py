"""Roles and keys of many kinds become role and content; every text stays."""

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from sloth_plugins.data import standardize_data_formats, standardize_sharegpt
from sloth_plugins.data.roles import ALIASES, CONTENT_KEYS, ROLE_KEYS, ROLES
from sloth_plugins.errors import SlothError


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(sorted(ROLES)), st.text(max_size=12)), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(ROLE_KEYS),
    st.sampled_from(CONTENT_KEYS),
    st.sampled_from([str, str.upper, str.title, lambda text: text.replace("_", "-")]),
    st.booleans(),
)
def test_every_message_is_there_with_its_role(dialogues, role_key, content_key, spelt, streaming):
    dialogues = [[(role, text.encode("utf-8", "ignore").decode()) for role, text in turns] for turns in dialogues]
    given_rows = [[{role_key: spelt(role), content_key: text} for role, text in turns] for turns in dialogues]
    data = Dataset.from_dict({"id": list(range(len(dialogues))), "conversations": given_rows})
    found = list(standardize_sharegpt(data.to_iterable_dataset() if streaming else data))
    assert [row["conversations"] for row in found] == [
        [{"role": ROLES[role], "content": text} for role, text in turns] for turns in dialogues
    ]
    assert [row["id"] for row in found] == list(range(len(dialogues)))


def test_both_names_are_one_function():
    assert standardize_data_formats is standardize_sharegpt


def test_the_standard_form_stays_as_it_is():
    messages = [{"role": role, "content": "内容 🦥", "name": None, "tool_calls": None} for role in ("system", *ALIASES)]
    messages[2] |= {"content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    data = Dataset.from_list([{"messages": messages, "tools": "[]"}])
    assert standardize_sharegpt(data)[0] == data[0]


def test_every_column_of_messages():
    one = [{"from": "human", "value": "q"}]
    data = DatasetDict(train=Dataset.from_list([{"prompt": one, "chosen": [{"from": "gpt", "value": "a"}], "n": 1}]))
    assert standardize_sharegpt(data)["train"][0] == {
        "n": 1,
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a"}],
    }


def test_types_hold_beyond_the_first_rows():
    rows = [{"messages": [{"from": "human", "value": "q", "name": None}]}] * 1500
    rows.append({"messages": [{"from": "tool", "value": "a", "name": "search"}]})
    assert standardize_sharegpt(Dataset.from_list(rows))[1500]["messages"][0]["name"] == "search"


def test_roles_of_ones_own():
    data = Dataset.from_list([{"messages": [{"from": "Customer", "value": "q"}]}])
    with pytest.raises(SlothError, match=r"row 0, message 0 .* has the role 'Customer'.*roles=\{'Customer': 'user'\}"):
        standardize_sharegpt(data)
    assert standardize_sharegpt(data, {"customer": "user"})[0]["messages"] == [{"role": "user", "content": "q"}]
    with pytest.raises(SlothError, match=r"maps to 'usr', which is none of system, .*; did you mean 'user'"):
        standardize_sharegpt(data, {"customer": "usr"})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "no column of conversations among text"),
        ({"messages": [{"from": "user", "value": "q"}, {"from": None, "value": "q"}]}, "message 1 .* has no role"),
        ({"messages": [{"from": "user", "value": "q"}, {"from": "gpt", "value": None}]}, "'gpt', has no content"),
    ],
)
def test_mistakes_are_one_line(row, said):
    with pytest.raises(SlothError, match=said) as caught:
        standardize_sharegpt(Dataset.from_list([row]))
    assert "\n" not in str(caught.value)

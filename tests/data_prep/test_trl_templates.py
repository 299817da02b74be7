"""Markers found by rendering against the masks of every model family that TRL knows."""

import pytest
from chat_tokenizers import tokenizer
from trl import chat_template_utils

from sloth_plugins.chat_template import Unexpressible
from sloth_plugins.data.answers import template_markers
from sloth_plugins.data.token_text import TokenText

# Their messages are lists of text and images.
VISION = {"idefics3", "llava_next", "smolvlm"}
SUFFIX = "_chat_template"
NAMES = sorted(
    name.removesuffix(SUFFIX)
    for name, value in vars(chat_template_utils).items()
    if name.endswith(SUFFIX) and isinstance(value, str) and "_training" not in name
)
MESSAGES = [
    {"role": "user", "content": "QUESTION one"},
    {"role": "assistant", "content": "REPLY one."},
    {"role": "user", "content": "QUESTION two\n\nplease"},
    {"role": "assistant", "content": "REPLY two"},
]


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_what_trl_takes_for_them_or_less_of_what_stands_before(name):
    made = tokenizer()
    made.chat_template = getattr(chat_template_utils, name + SUFFIX)
    tokens = TokenText(made)
    if name in VISION:
        with pytest.raises(Unexpressible):
            template_markers(tokens)
        return
    ids = made.apply_chat_template(MESSAGES, return_dict=True)["input_ids"]
    mask = template_markers(tokens).mask(ids, tokens)
    said = made.decode([id for id, kept in zip(ids, mask, strict=True) if kept])
    assert "QUESTION" not in said
    assert "please" not in said
    assert said.index("REPLY one.") < said.index("REPLY two")
    training = getattr(chat_template_utils, f"{name}_training{SUFFIX}", None)
    if training is None:
        return
    trl = made.apply_chat_template(
        MESSAGES, chat_template=training, return_dict=True, return_assistant_tokens_mask=True
    )
    if trl["input_ids"] == ids:  # not where TRL's own keeps the thoughts that the model's template drops
        assert all(theirs or not ours for ours, theirs in zip(mask, trl["assistant_masks"], strict=True))


def test_there_are_many():
    assert len(NAMES) >= 30

"""A chat template seen from outside: rendered with marked messages, it shows what stands around each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

Message = dict[str, str]
Render = Callable[..., str]
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
# No template changes these: one word each, none part of another.
MARKS = {role: [f"{role}Mark{letter}Text" for letter in "ABCD"] for role in (SYSTEM, USER, ASSISTANT)}


class Unexpressible(Exception):
    """Why no fixed strings put together what the template renders; the message is one line."""


@dataclass(frozen=True, slots=True)
class Around:
    """What stands before and after a message's content."""

    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Turns:
    """How questions and answers are written: `start` stands before the first question's content.

    `user.before` is what begins the later questions, `generation` what asks for an answer.
    """

    start: str
    user: Around
    assistant: Around
    generation: str


def conversations(*, system: bool) -> Iterator[list[Message]]:
    """Conversations of one to four questions, with a system message or without."""
    for count in (1, 2, 3, 4):
        messages = [{"role": SYSTEM, "content": MARKS[SYSTEM][0]}] if system else []
        for n in range(count):
            messages.append({"role": USER, "content": MARKS[USER][n]})
            if n + 1 < count:
                messages.append({"role": ASSISTANT, "content": MARKS[ASSISTANT][n]})
        yield messages


def read_turns(render: Render, special: Iterable[str]) -> Turns:
    """What stands around questions and answers, none of the `special` tokens cut in two.

    `render(messages, generation=...)` gives a conversation's text. Raises Unexpressible, with the reason.
    """
    two, special = list(conversations(system=False))[1], list(special)
    marks = [MARKS[USER][0], MARKS[ASSISTANT][0], MARKS[USER][1]]
    start, between, again, end = cut(render(two), marks)
    answered = cut(render(two[:2], generation=False), marks[:2])[2]
    asked = cut(render(two[:1], generation=False), marks[:1])[1]
    after_user = common(special, common(special, between, end), asked)
    after_assistant = common(special, again, answered)
    return Turns(
        start=start,
        user=Around(again[len(after_assistant) :], after_user),
        assistant=Around(between[len(after_user) :], after_assistant),
        generation=end[len(after_user) :],
    )


def render(tokenizer: Any, messages: Sequence[Message], *, generation: bool = True, **given: Any) -> str:
    """What the template makes of a conversation, and of `given`. Raises Unexpressible where it refuses."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise Unexpressible("the tokenizer has no chat template")
    try:
        options = {"tokenize": False, "add_generation_prompt": generation, **given}
        return str(tokenizer.apply_chat_template(list(messages), **options))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise Unexpressible(f"the chat template refuses {roles}: {' '.join(str(error).split())}") from None


def cut(text: str, marks: Sequence[str]) -> list[str]:
    """The strings before, between and after the marks, which come in this order and once each."""
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found or mark in text:
            raise Unexpressible("the chat template leaves a message out, or writes one twice")
        pieces.append(piece)
    return [*pieces, text]


def common(special: Iterable[str], left: str, right: str) -> str:
    """What both begin with, no special token cut in two."""
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
    for token in special:
        for text in (left, right):
            at = text.find(token, max(0, length - len(token) + 1))
            if 0 <= at < length < at + len(token):
                length = at
    return left[:length]

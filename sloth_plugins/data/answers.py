"""Where the assistant speaks in a text: between what begins its turns and what ends them.

All strings here are bytes as TokenText reads them.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..chat_template import (
    ASSISTANT,
    MARKS,
    SYSTEM,
    USER,
    Message,
    Turns,
    Unexpressible,
    common,
    conversations,
    cut,
    read_turns,
    render,
)
from .token_text import TokenText

WHITE = " \t\r\n"


@dataclass(frozen=True)
class Markers:
    """`response` begins an answer. It ends with `after`, or where one of `headers` begins a turn, or with the text."""

    response: str
    headers: tuple[str, ...]
    after: str = ""

    @cached_property
    def _begins(self) -> re.Pattern[str]:
        found = {header.strip(WHITE) for header in (self.response, *self.headers)} - {""}
        return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))))

    def answers(self, text: str) -> Iterator[tuple[int, int]]:
        """Where each answer begins and ends, what closes it included."""
        closing = self.after.strip(WHITE)
        at = text.find(self.response)
        while at >= 0:
            start = at + len(self.response)
            header = self._begins.search(text, start)
            end = header.start() if header else self._cut_end(text)
            closed = text.find(closing, start, end) if closing else -1
            if closed >= 0:
                end = closed + len(closing)
                space = self.after[self.after.index(closing) + len(closing) :]
                end += len(space) if text.startswith(space, end) else 0
            yield start, max(start, end)
            at = text.find(self.response, start)

    def _cut_end(self, text: str) -> int:
        """Where a text ends, without the beginning of a turn that a cut left of its header."""
        found = len(text)
        for header in self.headers:
            turn = self.after + header
            for length in range(len(turn) - 1, len(self.after), -1):
                if text.endswith(turn[:length]):
                    found = min(found, len(text) - length + len(self.after))
        return found

    def mask(self, ids: Sequence[int], tokens: TokenText) -> list[bool]:
        """Which tokens are the assistant's; one that is so only in part is, if the rest of it is space.

        So is an end of text that follows an answer, which a model must learn to write.
        """
        text, ends = tokens.read(ids)
        starts = [0, *ends[:-1]]
        eos = getattr(tokens.tokenizer, "eos_token_id", None)
        found = [False] * len(ids)
        for start, end in self.answers(text):
            n = bisect_right(ends, start)
            while n < len(ids) and starts[n] < end:
                found[n] = not (text[starts[n] : start] + text[end : max(end, ends[n])]).strip(WHITE)
                n += 1
            if n < len(ids) and ids[n] == eos and starts[n] == end:
                found[n] = True
        return found


def given_markers(instruction: str, response: str, tokens: TokenText) -> Markers:
    """The user's own markers, as they come out of the tokenizer; with what else the chat template begins turns by."""
    parts = []
    for part in (instruction, response):
        again = tokens.again(part)
        # SentencePiece writes a space before a text, which is not there within one.
        parts.append(again if part.startswith(" ") else again.removeprefix(" "))
    try:
        more = template_markers(tokens).headers
    except Unexpressible:
        more = ()
    return Markers(parts[1], (parts[0], *more))


def template_markers(tokens: TokenText) -> Markers:
    """The markers of the tokenizer's chat template. Raises Unexpressible where they do not tell the roles apart."""

    def show(messages: Sequence[Message], *, generation: bool = True) -> str:
        return tokens.again(render(tokens.tokenizer, messages, generation=generation))

    turns = read_turns(show, tokens.special)
    found = Markers(
        response=_response(turns, tokens.special),
        headers=(turns.user.before, *_other_headers(show, turns)),
        after=turns.assistant.after,
    )
    if not found.response.strip(WHITE):
        raise Unexpressible("the chat template writes nothing before an answer")
    for system in (False, True):
        for messages in conversations(system=system):
            _must_tell_apart(found, show, messages, may_refuse=system)
    return found


def _response(turns: Turns, special: Sequence[str]) -> str:
    """What asks for an answer, as far as it also stands before those that were given."""
    before = turns.assistant.before
    for text in (common(special, before, turns.generation), before):
        if text.strip(WHITE):
            return text
    return turns.user.after + turns.generation


def _other_headers(show: Any, turns: Turns) -> Iterator[str]:
    """What begins a message of the system or of a tool within a conversation, where the template writes these."""
    for role in (SYSTEM, "tool"):
        mark = f"{role}MarkLateText"
        messages = [
            {"role": USER, "content": MARKS[USER][0]},
            {"role": ASSISTANT, "content": MARKS[ASSISTANT][0]},
            {"role": role, "content": mark},
        ]
        try:
            text = show(messages, generation=False)
            yield cut(text, [MARKS[USER][0], MARKS[ASSISTANT][0], mark])[2].removeprefix(turns.assistant.after)
        except Unexpressible:
            continue


def _must_tell_apart(found: Markers, show: Any, messages: Sequence[Message], *, may_refuse: bool) -> None:
    try:
        text = show(messages)
    except Unexpressible:
        if may_refuse:
            return
        raise
    spans = list(found.answers(text))
    for message in messages:
        at = text.index(message["content"])
        inside = any(start <= at < end for start, end in spans)
        if inside != (message["role"] == ASSISTANT):
            raise Unexpressible("the chat template has no fixed strings that tell answers from the rest")

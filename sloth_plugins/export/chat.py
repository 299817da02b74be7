"""A chat template as fixed strings around the messages, for what cannot run Jinja.

Jinja cannot be translated, but most templates write every message between two fixed strings. Those strings are found by
rendering, and kept only if they put together what the template renders, on every conversation tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from ..chat_template import (
    ASSISTANT,
    MARKS,
    SYSTEM,
    USER,
    Around,
    Message,
    Unexpressible,
    conversations,
    cut,
    read_turns,
    render,
)

# What a template may be given beside messages; what it is without them is what Ollama's is.
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "The word."}},
            "required": ["word"],
        },
    },
}


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a conversation is written: `start`, each message between its strings, then `generation`.

    `system` is written in its place, or, with `system_in` first or last, within that user's message before its content.
    With `always_system` it is there even when it is empty. `default_system` is what the template says where the
    conversation has no system message. Without `system` there can be none.
    """

    start: str
    user: Around
    assistant: Around
    generation: str
    system: Around | None = None
    system_in: Literal["place", "first", "last"] = "place"
    always_system: bool = False
    default_system: str = ""

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for an answer to `messages`, of which a system message, if any, is the first."""
        given = messages[0]["content"] if messages and messages[0]["role"] == SYSTEM else ""
        text = given or self.default_system
        system = "" if self.system is None else f"{self.system.before}{text}{self.system.after}"
        system = system if text or self.always_system else ""
        rest = [message for message in messages if message["role"] != SYSTEM]
        users = [n for n, message in enumerate(rest) if message["role"] == USER]
        at = {"place": None, "first": users[0], "last": users[-1]}[self.system_in]
        result = self.start + (system if at is None else "")
        for n, message in enumerate(rest):
            around = self.user if message["role"] == USER else self.assistant
            result += around.before + (system if n == at else "") + message["content"] + around.after
        return result + self.generation


def read_format(tokenizer: Any) -> ChatFormat:
    """The strings around the messages of a tokenizer's chat template. Raises Unexpressible, with the reason."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise Unexpressible("the tokenizer has no chat template")
    if "strftime_now" in str(template):
        raise Unexpressible("the chat template writes today's date")
    found = _with_system(tokenizer, _without_system(tokenizer))
    for messages in conversations(system=False):
        _must_agree(tokenizer, found, messages)
    if found.system is not None:
        for messages in conversations(system=True):
            _must_agree(tokenizer, found, messages)
    return found


def unlike_ollama(tokenizer: Any, found: ChatFormat) -> list[str]:
    """What a chat template does to a message, which Ollama takes as it is; a line each."""
    notes = []
    if found.system is None:
        notes.append("the chat template takes no system message, so the Modelfile's leaves it out")
    question = {"role": USER, "content": f" {MARKS[USER][0]} "}
    if question["content"] not in render(tokenizer, [question]):
        notes.append("the chat template strips spaces around messages, which Ollama's does not")
    answer = {"role": ASSISTANT, "content": f"<think>{MARKS[ASSISTANT][1]}</think>{MARKS[ASSISTANT][0]}"}
    if MARKS[ASSISTANT][1] not in render(tokenizer, [question, answer, question]):
        notes.append("the chat template drops the thoughts of earlier answers, which Ollama's does not")
    if _changes_with(tokenizer, tools=[TOOL]):
        notes.append(
            "the chat template writes tools, which the Modelfile's TEMPLATE leaves out, so Ollama refuses them"
        )
    if any(_changes_with(tokenizer, enable_thinking=value) for value in (True, False)):
        notes.append("the chat template has enable_thinking; the Modelfile's TEMPLATE is as where that is not set")
    return notes


def _changes_with(tokenizer: Any, **given: Any) -> bool:
    """Whether the template heeds what is given beside a question; where it fails of it, it does."""
    question = [{"role": USER, "content": MARKS[USER][0]}]
    try:
        return render(tokenizer, question, **given) != render(tokenizer, question)
    except Unexpressible:
        return True


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an answer, where there is one."""
    try:
        answered = [{"role": USER, "content": MARKS[USER][0]}, {"role": ASSISTANT, "content": MARKS[ASSISTANT][0]}]
        text = render(tokenizer, answered, generation=False)
    except Unexpressible:
        return None
    after = text.partition(MARKS[ASSISTANT][0])[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.added_tokens_decoder)
    return next((token for token in ids if token in special), None)


def _must_agree(tokenizer: Any, found: ChatFormat, messages: Sequence[Message]) -> None:
    if found.render(messages) != render(tokenizer, messages):
        roles = ", ".join(message["role"] for message in messages)
        raise Unexpressible(
            f"the chat template does more than write messages between fixed strings (seen with {roles})"
        )


def _without_system(tokenizer: Any) -> ChatFormat:
    """User, assistant and generation; `start` still holds what a default system message writes."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    turns = read_turns(partial(render, tokenizer), special)
    before = turns.user.before
    if not turns.start.endswith(before):
        raise Unexpressible("the chat template begins the first question otherwise than the next ones")
    start = turns.start[: len(turns.start) - len(before)]
    return ChatFormat(start=start, user=turns.user, assistant=turns.assistant, generation=turns.generation)


def _with_system(tokenizer: Any, bare: ChatFormat) -> ChatFormat:
    """`bare` with where and how a system message is written; as it was where the template takes none."""
    one, two = list(conversations(system=True))[:2]
    mark, user = MARKS[SYSTEM][0], bare.user.before
    try:
        head, tail = cut(render(tokenizer, one), [mark])
    except Unexpressible:
        return bare
    middle = cut(tail, MARKS[USER][:1])[0]
    if middle.endswith(user) and not (head.endswith(user) and head[: -len(user)] == bare.start):
        return _in_place(tokenizer, bare, head, middle[: len(middle) - len(user)])
    inside = bare.start + user
    if not head.startswith(inside):
        raise Unexpressible("the chat template writes a system message in a way of its own")
    around = Around(head[len(inside) :], middle)
    first = render(tokenizer, two).index(mark) < render(tokenizer, two).index(MARKS[USER][0])
    return replace(bare, system=around, system_in="first" if first else "last")


def _in_place(tokenizer: Any, bare: ChatFormat, head: str, after: str) -> ChatFormat:
    """A system message of its own. What stands before the first question without one is a default, or nothing."""
    empty = _bos(tokenizer)
    start = empty if head.startswith(empty) and bare.start.startswith(empty) else ""
    before, default = head[len(start) :], bare.start[len(start) :]
    if not default:
        return replace(bare, start=start, system=Around(before, after))
    if not (default.startswith(before) and default.endswith(after) and len(default) >= len(before) + len(after)):
        raise Unexpressible("the chat template writes something else where there is no system message")
    text = default[len(before) : len(default) - len(after)]
    return replace(bare, start=start, system=Around(before, after), always_system=not text, default_system=text)


def _bos(tokenizer: Any) -> str:
    return str(tokenizer.bos_token or "")

"""Conversations in one form: `role` and `content`, and the roles that chat templates know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SlothError, nearest
from .splits import column_names, each_split, first_rows

ROLE_KEYS = ("role", "from", "speaker", "author")
CONTENT_KEYS = ("content", "value", "text")
ALIASES = {
    "system": ("system", "developer", "system_prompt"),
    "user": ("user", "human", "prompter", "input", "instruction", "question", "usr"),
    "assistant": (
        "assistant", "gpt", "model", "bot", "ai", "chatgpt", "chatbot", "output", "response", "answer", "agent", "asst",
        "function_call",
    ),
    "tool": ("tool", "function", "observation", "ipython", "tool_response", "function_response", "tool_result"),
}  # fmt: skip
ROLES = {alias: role for role, aliases in ALIASES.items() for alias in aliases}


def standardize_sharegpt(dataset: Any, roles: Mapping[str, str] | None = None) -> Any:
    """Every column of conversations as lists of `role` and `content`, under its own name; the rest is left as it is.

    Roles become system, user, assistant or tool, whatever case and name they came under; `roles` maps further names
    to these. Other keys of a message (`tool_calls`, `name`) stay. Streaming datasets and DatasetDicts too.

    Raises SlothError where there is no such column, for a role that is not known, and for a message without content.
    """
    known = {**ROLES, **{_plain(name): role for name, role in (roles or {}).items()}}
    wrong = sorted(set(known.values()) - set(ALIASES))
    if wrong:
        raise SlothError(
            f"roles maps to {wrong[0]!r}, which is none of {', '.join(ALIASES)}{nearest(wrong[0], ALIASES)}"
        )
    return each_split(dataset, lambda split: _standardize(split, known))


standardize_data_formats = standardize_sharegpt


def _standardize(dataset: Any, known: Mapping[str, str]) -> Any:
    rows = first_rows(dataset, 16)
    columns = [name for name in column_names(dataset) if any(_is_conversation(row.get(name)) for row in rows)]
    if not columns:
        raise SlothError(
            f"no column of conversations among {', '.join(column_names(dataset))}: lists of messages with "
            f"{' or '.join(map(repr, ROLE_KEYS))}, and {' or '.join(map(repr, CONTENT_KEYS))}; to_sharegpt makes one"
        )
    return dataset.map(
        _rewrite,
        with_indices=True,
        fn_kwargs={"columns": columns, "known": dict(known)},
        # What is mapped anew would keep its old keys, as nothing.
        remove_columns=columns,
        features=_features(dataset, columns),
    )


def _is_conversation(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and any(map(first.get, ROLE_KEYS)) and not first.keys().isdisjoint(CONTENT_KEYS)


def _features(dataset: Any, columns: Sequence[str]) -> Any:
    """The dataset's features with the new keys: types that are read off the first rows would not hold for all."""
    from datasets import Features, Value

    if dataset.features is None:
        return None
    features = dict(dataset.features)
    for column in columns:
        message = features[column].feature
        content = next(message[key] for key in CONTENT_KEYS if key in message)
        rest = {key: value for key, value in message.items() if key not in (*ROLE_KEYS, *CONTENT_KEYS)}
        features[column] = type(features[column])({"role": Value("string"), "content": content, **rest})
    return Features(features)


def _rewrite(row: Mapping[str, Any], number: int, columns: Sequence[str], known: Mapping[str, str]) -> dict[str, Any]:
    return {
        column: [_message(message, f"row {number}, message {n}", known) for n, message in enumerate(row[column] or [])]
        for column in columns
    }


def _message(message: Mapping[str, Any], place: str, known: Mapping[str, str]) -> dict[str, Any]:
    given = next((message[key] for key in ROLE_KEYS if message.get(key)), None)
    content = next((message[key] for key in CONTENT_KEYS if message.get(key) is not None), None)
    if given is None:
        raise SlothError(f"{place} (the first is 0) has no role; its keys are {', '.join(message)}")
    role = known.get(_plain(given))
    if role is None:
        raise SlothError(
            f"{place} (the first is 0) has the role {given!r}, which is not known (roles={{{given!r}: 'user'}} "
            f"would make it one){nearest(_plain(given), known)}"
        )
    if content is None and not message.get("tool_calls"):
        raise SlothError(f"{place} (the first is 0), of the role {given!r}, has no content")
    rest = {key: value for key, value in message.items() if key not in (*ROLE_KEYS, *CONTENT_KEYS)}
    return {"role": role, "content": content, **rest}


def _plain(role: str) -> str:
    return str(role).strip().lower().replace(" ", "_").replace("-", "_")

"""Single-turn rows as ShareGPT dialogues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SlothError, nearest
from .prompts import Part, as_text, parse
from .splits import column_names, each_split, is_streaming

COLUMN = "conversations"
# Rows of text that a streaming dataset keeps in memory to shuffle them.
SHUFFLED = 10_000
Turns = list[dict[str, str]]


def to_sharegpt(
    dataset: Any,
    merged_prompt: str = "{instruction}[[\nInput: {input}]]",
    output_column_name: str = "output",
    conversation_extension: int = 1,
    *,
    dialogue_extension: int | None = None,
    random_state: int = 3407,
) -> Any:
    """Rows of a prompt and its answer as dialogues: a column `conversations` of `from` and `value`, and nothing else.

    In `merged_prompt`, `{column}` stands for a row's value, and a part in `[[ ]]` is left out where a column in it is
    empty. With `conversation_extension=N` (or `dialogue_extension`) the rows are shuffled by `random_state`, and each N
    of them become one dialogue of N questions; every row is in one dialogue, once, and what is left over makes a
    shorter last one. A streaming dataset shuffles within its next 10,000 rows. Works on every split of a DatasetDict.

    Raises SlothError for a column that is not there, and for a row without a prompt or without an answer.
    """
    count = _extension(conversation_extension, dialogue_extension)
    return each_split(dataset, lambda split: _convert(split, merged_prompt, output_column_name, count, random_state))


def _extension(conversation: int, dialogue: int | None) -> int:
    if dialogue is not None and conversation not in (1, dialogue):
        raise SlothError(
            f"conversation_extension={conversation} and dialogue_extension={dialogue} are one setting; give one"
        )
    count = conversation if dialogue is None else dialogue
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise SlothError(f"conversation_extension is a number of rows, 1 or more, not {count!r}")
    return count


def _convert(dataset: Any, prompt: str, output: str, count: int, seed: int) -> Any:
    from datasets import Features, List, Value

    columns = column_names(dataset)
    if output not in columns:
        known = ", ".join(columns)
        raise SlothError(f"no column {output!r} to answer with{nearest(output, columns)} (columns: {known})")
    features = Features({COLUMN: List({"from": Value("string"), "value": Value("string")})})
    parts = {"parts": parse(prompt, columns), "output": output}
    single = dataset.map(_turns, with_indices=True, fn_kwargs=parts, remove_columns=columns, features=features)
    if count == 1:
        return single
    buffer = {"buffer_size": SHUFFLED} if is_streaming(single) else {}
    shuffled = single.shuffle(seed=seed, **buffer)
    return shuffled.map(_join, batched=True, batch_size=count, features=features)


def _turns(row: Mapping[str, Any], number: int, parts: Sequence[Part], output: str) -> dict[str, Turns]:
    question = "".join(part.text(row) for part in parts)
    answer = as_text(row[output], output)
    for what, text in (("prompt", question), (repr(output), answer)):
        if not text.strip():
            raise SlothError(
                f"row {number} (the first is 0) has an empty {what}; filter such rows out, or read the file by "
                "load_rows, which does so and says which they are"
            )
    return {COLUMN: [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def _join(rows: Mapping[str, Sequence[Turns]]) -> dict[str, list[Turns]]:
    return {COLUMN: [[turn for turns in rows[COLUMN] for turn in turns]]}

"""Loss on the assistant's answers alone, for a trainer whose data is tokenised, packed or not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from ..chat_template import Unexpressible
from ..errors import SlothError
from ..processes import say
from .answers import Markers, given_markers, template_markers
from .splits import column_names, each_split, first_rows, is_streaming
from .token_text import TokenText

IGNORED = -100
TRAINED, ALL = "answer_tokens", "all_tokens"  # columns while rows are counted
SHOWN = 600  # characters of the example
LOOKED_AT = 100  # rows of a streaming dataset that may have no answer before it counts as having none
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def train_on_responses_only(trainer: Any, instruction_part: str | None = None, response_part: str | None = None) -> Any:
    """Set the labels of all that is not the assistant's to -100, in the train and eval data; returns the trainer.

    Where the tokenizer's own chat template marks the assistant (`{% generation %}`) and a row still has its messages,
    it says which tokens are meant. Else answers lie between the strings that the template writes around them, found by
    rendering; or after `response_part` until the next `instruction_part`, for text that was made without it. Packed
    rows are taken apart by `seq_lengths`; of rows that are cut anywhere (`packing_strategy="wrapped"`), the end of an
    answer that began in the row before is not trained on. Labels that were -100 stay so. Rows without an answer are
    left out and counted. One example of what is trained on is printed.

    Raises SlothError where the data is not tokenised, no markers can be found, or nothing would be left to train on.
    """
    if (instruction_part is None) != (response_part is None):
        raise SlothError("instruction_part and response_part belong together; give both, or none of them")
    from accelerate import PartialState

    holder = getattr(trainer, "processing_class", None)
    tokenizer = getattr(holder, "tokenizer", holder)
    if tokenizer is None:
        raise SlothError("the trainer has no tokenizer; give it one as processing_class")
    answers = Answers(tokenizer, instruction_part, response_part)
    processes = getattr(getattr(trainer, "args", None), "dataset_num_proc", None)
    new = {}
    with PartialState().main_process_first():  # the others then read what it cached
        for name in ("train_dataset", "eval_dataset"):
            kind = name.partition("_")[0]
            if getattr(trainer, name, None) is not None:
                new[name] = each_split(
                    getattr(trainer, name), partial(_mask, answers=answers, name=kind, processes=processes)
                )
    if not new:
        raise SlothError("the trainer has no data, neither train_dataset nor eval_dataset")
    for name, dataset in new.items():
        setattr(trainer, name, dataset)
    _keep_labels(trainer, tokenizer)
    return trainer


class Answers:
    """Tells which tokens of a row are the assistant's."""

    def __init__(self, tokenizer: Any, instruction: str | None, response: str | None):
        self.tokenizer = tokenizer
        self.tokens = TokenText(tokenizer)
        self.by_template = response is None and bool(_GENERATION.search(str(getattr(tokenizer, "chat_template", ""))))
        self.markers: Markers | None = None
        self.why = ""
        try:
            self.markers = (
                template_markers(self.tokens)
                if instruction is None or response is None
                else given_markers(instruction, response, self.tokens)
            )
        except Unexpressible as error:
            self.why = str(error)

    def labels(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row's labels, and how many of them are trained on, of how many."""
        ids = _plain(row["input_ids"])
        labels = _plain(row["labels"]) if row.get("labels") is not None else ids
        found = self._by_template(row, ids) if self.by_template else None
        found = self._by_markers(row, ids) if found is None else found
        labels = [label if is_answer else IGNORED for label, is_answer in zip(labels, found, strict=True)]
        return {"labels": labels, TRAINED: sum(label != IGNORED for label in labels), ALL: len(ids)}

    def _by_markers(self, row: Mapping[str, Any], ids: list[int]) -> list[bool]:
        if self.markers is None:
            raise SlothError(
                f"answers cannot be told from the rest: {self.why}; give instruction_part and response_part, the text "
                "that stands before every question and every answer"
            )
        found: list[bool] = []
        for length in _plain(row.get("seq_lengths") or [len(ids)]):
            found += self.markers.mask(ids[len(found) : len(found) + length], self.tokens)
        return found

    def _by_template(self, row: Mapping[str, Any], ids: list[int]) -> list[bool] | None:
        """What the template marks, if it is what made these tokens; they may be cut at either end."""
        messages = row.get("messages") or row.get("conversations")
        if not messages and isinstance(row.get("prompt"), list):
            messages = [*row["prompt"], *row.get("completion", [])]
        if not isinstance(messages, list) or "role" not in messages[0]:
            return None
        tools = row.get("tools")
        made = self.tokenizer.apply_chat_template(
            messages,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **(row.get("chat_template_kwargs") or {}),
        )
        rendered, mask = made["input_ids"], list(map(bool, made["assistant_masks"]))
        if rendered[: len(ids)] == ids:
            return mask[: len(ids)]
        return mask[-len(ids) :] if rendered[-len(ids) :] == ids else None


def _mask(dataset: Any, answers: Answers, name: str, processes: int | None) -> Any:
    columns = column_names(dataset)
    if "input_ids" not in columns:
        raise SlothError(
            f"the {name} data is not tokenised (columns: {', '.join(columns)}); SFTTrainer does so when it is made"
        )
    if is_streaming(dataset):
        masked = dataset.map(answers.labels)
        rows = first_rows(masked, LOOKED_AT)
        example = next((row for row in rows if row[TRAINED]), None)
        _must_be(example, dataset, answers, name)
        say(f"{name} data, streaming: loss on the answers alone. {_shown(example, answers)}")
        return masked.filter(_has_answer).remove_columns([TRAINED, ALL])
    if not len(dataset):
        _must_be(None, dataset, answers, name)
    masked = dataset.map(answers.labels, num_proc=processes, desc=f"Answers of the {name} data")
    counts = masked.with_format("numpy", columns=[TRAINED, ALL])[:]
    kept = counts[TRAINED].nonzero()[0]
    masked = masked.remove_columns([TRAINED, ALL])
    example = masked[int(kept[0])] if len(kept) else None
    _must_be(example, dataset, answers, name)
    lost = len(masked) - len(kept)
    left = f" {lost} of {len(masked)} rows have no answer and are left out." if lost else ""
    say(
        f"{name} data: loss on the answers alone, {counts[TRAINED].sum()} of {counts[ALL].sum()} tokens in {len(kept)} "
        f"rows.{left} {_shown(example, answers)}"
    )
    return masked.select(kept) if lost else masked


def _has_answer(row: Mapping[str, Any]) -> bool:
    return bool(row[TRAINED])


def _must_be(example: Any, dataset: Any, answers: Answers, name: str) -> None:
    if example is not None:
        return
    row = next(iter(dataset), None)
    text = "nothing: there are no rows" if row is None else repr(answers.tokenizer.decode(row["input_ids"])[:SHOWN])
    response = "" if answers.markers is None else answers.markers.response.encode("latin-1").decode("utf-8", "replace")
    raise SlothError(
        f"nothing of the {name} data would be trained on: {response!r} begins no answer; the first row reads {text}; "
        "give instruction_part and response_part as your text has them, or give a larger max_length, if rows are cut "
        "before their answers"
    )


def _shown(row: Any, answers: Answers) -> str:
    """A row as text, with [...] for what is not trained on."""
    pairs = zip(_plain(row["input_ids"]), _plain(row["labels"]), strict=True)
    parts = []
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        parts.append(answers.tokenizer.decode([id for id, _ in run]) if trained else "[...]")
    text = "".join(parts)
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
    return f"One row, with what is masked as [...]:\n{text}"


def _keep_labels(trainer: Any, tokenizer: Any) -> None:
    """Replace transformers' own language-modelling collator, which makes labels anew of all tokens."""
    from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

    collator = getattr(trainer, "data_collator", None)
    if isinstance(collator, DataCollatorForLanguageModeling):
        trainer.data_collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=collator.pad_to_multiple_of)
        say("the data collator made labels of all tokens; DataCollatorForSeq2Seq, which keeps them, is in its place")


def _plain(values: Sequence[Any] | Any) -> list[int]:
    return values.tolist() if hasattr(values, "tolist") else list(values)

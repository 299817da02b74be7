"""Calls of TRL's trainers as they were before their arguments moved: to `processing_class`, and into the config.

What a trainer and its config take is read from them, so that a call is changed only where it would not be taken.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

Arguments = tuple[tuple[Any, ...], dict[str, Any], str]

PARAMETERS = {"tokenizer": "processing_class"}
# What constructors once took and a config takes now, by its name there.
FIELDS = {
    "max_seq_length": "max_length",
    **{
        name: name
        for name in (
            *("dataset_text_field", "packing", "eval_packing", "dataset_num_proc", "dataset_kwargs"),
            *("neftune_noise_alpha", "model_init_kwargs", "beta", "label_smoothing", "loss_type", "truncation_mode"),
            *("max_length", "max_prompt_length", "max_completion_length", "disable_dropout", "padding_value"),
            *("label_pad_token_id", "is_encoder_decoder", "generate_during_eval", "precompute_ref_log_probs"),
            *("desirable_weight", "undesirable_weight"),
        )
    },
}
# What has no counterpart where the config does not have it, and why a call can do without.
GONE = {"max_prompt_length": "prompt and completion are cut together, at max_length"}
# Where a trainer cannot do with the default of TrainingArguments, and its config has one of its own.
OWN = ("train_sampling_strategy", "remove_unused_columns")


def translated(trainer: type) -> Callable[[tuple[Any, ...], dict[str, Any]], Arguments]:
    """How calls of a trainer's constructor are translated: arguments in, arguments and what was changed out."""
    parameters = tuple(inspect.signature(trainer).parameters)
    config: Any = vars(sys.modules[trainer.__module__]).get(trainer.__name__.replace("Trainer", "Config"))
    if config is None:
        # A class that only stands under an old name for the one that it derives from, where the call comes to next.
        return lambda args, kwargs: (args, kwargs, "")
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    # SFTTrainer makes its own config of plain TrainingArguments; the others fail on them.
    makes_config = "TrainingArguments" in str(inspect.signature(trainer).parameters["args"].annotation)

    def translate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        values: dict[str, Any] = {}
        changes: list[str] = []
        for name in kwargs.keys() - set(parameters):
            moved = PARAMETERS.get(name)
            field = FIELDS.get(name)
            if moved in parameters and moved not in given:
                given[moved] = given.pop(name)
                changes.append(f"{name} -> {moved}")
            elif field in fields:
                # None meant that nothing was chosen.
                chosen = given.pop(name)
                values |= {} if chosen is None else {field: chosen}
                changes.append(f"{name} -> {config.__name__}.{field}")
            elif name in GONE:
                del given[name]
                changes.append(f"{name} -> nothing ({GONE[name]})")
        arguments = given.get("args")
        # transformers' own TrainingArguments, from which every config derives.
        is_plain = arguments is not None and not isinstance(arguments, config) and issubclass(config, type(arguments))
        if is_plain and not makes_config:
            changes.append(f"args -> {config.__name__}")
        if values or (is_plain and not makes_config):
            given["args"] = _config(config, arguments, values)
        return ((), given, ", ".join(sorted(changes))) if changes else (args, kwargs, "")

    return translate


def _config(kind: Any, arguments: Any, values: Mapping[str, Any]) -> Any:
    """The config that says what `arguments` say, and `values`."""
    if arguments is None:
        return kind(output_dir="trainer_output", **values)
    if isinstance(arguments, kind):
        return dataclasses.replace(arguments, **values)
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    given = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(arguments)
        if field.init and field.name in fields
        if field.name not in OWN or getattr(arguments, field.name) != field.default
    }
    return kind(**{**given, **values})

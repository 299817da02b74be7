"""Trainers of TRL's, called as they were before their arguments moved; undone without a trace."""

import dataclasses
import inspect
import re
from importlib import import_module

import pytest
import transformers
from datasets import Dataset, disable_progress_bars
from trl import DPOTrainer, SFTConfig, SFTTrainer

from sloth_plugins import activate, construction, deactivate, seams
from sloth_plugins.discovery import Plugins
from sloth_plugins.registry import ArchitectureSpec, Patch, SpecError
from sloth_plugins.selection import parse

PAIRS = [{"prompt": f"{n}", "chosen": "a b", "rejected": "b c"} for n in range(8)]
ROWS = {
    "SFTTrainer": [{"words": f"{n}+{n}={2 * n}"} for n in range(8)],
    "KTOTrainer": [{"prompt": f"{n}", "completion": "a b", "label": n % 2 == 0} for n in range(8)],
}
PATHS = {
    "DPOTrainer": "trl.trainer.dpo_trainer",
    "KTOTrainer": "trl.trainer.kto_trainer",
    "RewardTrainer": "trl.trainer.reward_trainer",
    "ORPOTrainer": "trl.experimental.orpo.orpo_trainer",
    "CPOTrainer": "trl.experimental.cpo.cpo_trainer",
}
OPTIONS = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_steps": 1}


@pytest.fixture
def parts(tiny, tmp_path):
    disable_progress_bars()

    def made(name="SFTTrainer", kind=transformers.TrainingArguments, **options):
        auto = transformers.AutoModelForSequenceClassification if name == "RewardTrainer" else None
        model = (auto or transformers.AutoModelForCausalLM).from_pretrained(tiny, **({"num_labels": 1} if auto else {}))
        model.config.pad_token_id = 0
        return {
            "model": model,
            "train_dataset": Dataset.from_list(ROWS.get(name, PAIRS)),
            "tokenizer": transformers.AutoTokenizer.from_pretrained(tiny),
            "args": kind(output_dir=str(tmp_path), **OPTIONS, **options),
        }

    return made


def test_a_call_of_sft_as_it_was(parts, capsys):
    activate("1")
    given = parts(learning_rate=3e-4)
    trainer = SFTTrainer(**given, dataset_text_field="words", max_seq_length=6, packing=False, dataset_num_proc=None)
    assert type(trainer.args) is SFTConfig
    assert (trainer.args.dataset_text_field, trainer.args.max_length, trainer.args.packing) == ("words", 6, False)
    assert (trainer.args.learning_rate, trainer.args.max_steps) == (3e-4, 1)
    assert trainer.processing_class is given["tokenizer"]
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) == 6
    trainer.train()
    said = capsys.readouterr().err.splitlines()
    changed = (
        "dataset_num_proc -> SFTConfig.dataset_num_proc, dataset_text_field -> SFTConfig.dataset_text_field, "
        "max_seq_length -> SFTConfig.max_length, packing -> SFTConfig.packing, tokenizer -> processing_class"
    )
    (row,) = [line for line in said if line.split()[:1] == ["trl:trl_legacy_arguments"]]
    assert row.split(maxsplit=3)[1:] == ["1", "applied", changed]
    # Once, although it is called twice.
    SFTTrainer(**parts(), dataset_text_field="words", max_seq_length=6, packing=False, dataset_num_proc=None)
    again = capsys.readouterr().err.splitlines()
    lines = [line for line in [*said, *again] if "called as in older versions" in line]
    assert len(lines) == 1
    assert lines[0].endswith(f"trl:trl_legacy_arguments has translated: {changed}")


def test_the_constructors_own_argument_wins_over_the_config(parts):
    activate("1")
    given = parts(kind=SFTConfig, max_length=32, dataset_text_field="words")
    trainer = SFTTrainer(given.pop("model"), given.pop("args"), **given, max_seq_length=5)
    assert (trainer.args.max_length, trainer.args.dataset_text_field) == (5, "words")


@pytest.mark.parametrize("name", list(PATHS))
def test_the_other_trainers(name, parts):
    pytest.importorskip(PATHS[name], exc_type=ImportError)
    activate("1")
    module = import_module(PATHS[name])
    given = parts(name)
    trainer = getattr(module, name)(**given, max_length=16)
    assert type(trainer.args) is getattr(module, name.replace("Trainer", "Config"))
    assert (trainer.args.max_length, trainer.args.max_steps) == (16, 1)
    assert trainer.processing_class is given["tokenizer"]


def test_what_has_no_counterpart_is_named(parts, capsys):
    activate("1")
    trainer = DPOTrainer(**parts("DPOTrainer"), beta=0.3, loss_type="ipo", max_length=16, max_prompt_length=8)
    assert (trainer.args.beta, trainer.args.loss_type) == (0.3, ["ipo"])
    said = capsys.readouterr().err
    assert "args -> DPOConfig" in said
    assert "max_prompt_length -> nothing (prompt and completion are cut together, at max_length)" in said


def test_nothing_legacy_is_nothing_changed(parts, capsys):
    activate("1")
    given = parts(kind=SFTConfig, dataset_text_field="words")
    given["processing_class"] = given.pop("tokenizer")
    trainer = SFTTrainer(**given)
    assert trainer.args is given["args"]
    assert construction.outcomes_of(trainer) == []
    assert "older versions" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"foo": 1}, "foo"),
        ({"max_len": 8}, "max_len"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"processing_class": None}, "tokenizer"),
    ],
)
def test_a_mistake_stays_a_mistake(parts, more, named):
    activate("1")
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{named}'"):
        SFTTrainer(**parts(), **more)


def test_a_value_that_the_config_refuses_is_told(parts, capsys):
    activate("1")
    with pytest.raises(TypeError, match="unexpected keyword"):
        DPOTrainer(**parts("DPOTrainer"), loss_type="ipo", max_length=8, model_init_kwargs="{")
    assert "leaves the call of DPOTrainer as it is, since JSONDecodeError" in capsys.readouterr().err


@pytest.mark.parametrize("selection", ["1,-trl:trl_legacy_arguments", "llama"])
def test_what_is_not_selected_is_not_translated(parts, selection):
    activate(selection)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tokenizer'"):
        SFTTrainer(**parts())


def test_deactivated_it_is_trls_own_again(parts):
    deactivate()
    before, signature = vars(SFTTrainer)["__init__"], inspect.signature(SFTTrainer)
    activate("1")
    assert vars(SFTTrainer)["__init__"] is not before
    assert inspect.signature(SFTTrainer) == signature
    deactivate()
    assert vars(SFTTrainer)["__init__"] is before
    with pytest.raises(TypeError, match="unexpected keyword argument 'tokenizer'"):
        SFTTrainer(**parts())


def test_a_class_that_derives_from_trls(parts):
    class Own(SFTTrainer):
        def __init__(self, *args, note, **kwargs):
            super().__init__(*args, **kwargs)
            self.note = note

    activate("1")
    trainer = Own(**parts(), dataset_text_field="words", note="mine")
    assert (type(trainer), trainer.note, trainer.args.dataset_text_field) == (Own, "mine", "words")
    assert [outcome.trainer for outcome in construction.outcomes_of(trainer)] == ["Own"]


def legacy():
    known = Plugins(load_entry_points=False)
    return [(spec, patch) for spec in known.trainers.values() for patch in spec.patches if patch.constructor]


@pytest.mark.parametrize("named", [False, True])
def test_a_version_that_does_not_fit(parts, named, capsys):
    """Left as it is, with the reason; where it was asked for by name, the end."""
    spec, patch = next(found for found in legacy() if found[0].name == "trl_sft")
    old = dataclasses.replace(spec, patches=(dataclasses.replace(patch, requires=("trl<0.1",)),))
    known = Plugins(load_entry_points=False)
    known.trainers = {spec.name: old}
    deactivate()
    said = []
    selection = "trl:trl_legacy_arguments" if named else "1"
    module = import_module(SFTTrainer.__module__)
    construction.open_constructors(module, known, lambda: parse(selection), said.append)
    try:
        with pytest.raises(SystemExit if named else TypeError):
            SFTTrainer(**parts())
    finally:
        seams.close_seams()
    assert re.search("needs trl<0.1, found", said[0])


def test_somebody_elses_constructor_is_left_alone(monkeypatch):
    deactivate()
    monkeypatch.setattr(SFTTrainer, "__init__", lambda self, **given: None)
    said = []
    known = Plugins(load_entry_points=False)
    construction.open_constructors(import_module(SFTTrainer.__module__), known, lambda: None, said.append)
    seams.close_seams()
    assert said == [
        f"trl:trl_legacy_arguments is left out for SFTTrainer: SFTTrainer.__init__ was replaced by {__name__}"
    ]


def test_the_seams_wait_for_every_trainer_that_has_such_a_patch():
    modules = {path.partition(":")[0] for _, patch in legacy() for path in (patch.target, *patch.formerly)}
    assert modules == set(seams.TRAINERS)


def test_no_architecture_has_a_constructor():
    patch = Patch(name="made", target="a.b:C", replacement="d:e", constructor=True)
    with pytest.raises(SpecError, match="only a TrainerSpec has"):
        ArchitectureSpec(name="toy", model_types=("toy",), patches=(patch,))

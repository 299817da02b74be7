"""Patches of trainers: which trainer gets which, what the trainer still is, and how it gets its class back."""

import copy
import gc
import json
import re
import sys
import weakref

import pytest
import torch
from toy_patches import CALLS, TOY, model, of_trainers, patch
from toy_trainers import DerivedTrainer, OtherTrainer, ToyTrainer

import sloth_plugins
from sloth_plugins import application, discovery, trainers
from sloth_plugins.errors import SlothError
from sloth_plugins.listing import as_json_text


def test_a_trainer_that_trains_runs_the_replacement_and_is_what_it_was(declare, make, capsys):
    declare()
    trainer = make()
    sloth_plugins.activate("1")
    trainer.train()
    assert CALLS == ["inner", "unit"]
    assert re.search(r"toy:first +1 +applied", capsys.readouterr().err)
    assert type(trainer) is not ToyTrainer
    assert isinstance(trainer, ToyTrainer)
    names = (type(trainer).__name__, type(trainer).__qualname__, type(trainer).__module__)
    assert names == ("ToyTrainer", "ToyTrainer", "toy_trainers")


def test_losses_are_those_of_the_stock_trainer(declare, make):
    declare()
    losses = []
    for selection in ("off", "toy"):
        trainer = make()
        sloth_plugins.activate(selection)
        losses.append(trainer.train().training_loss)
    assert CALLS == ["inner", "unit"]
    assert losses[0] == losses[1]


def test_evaluation_without_training_is_patched_too(declare, make):
    declare()
    trainer = make()
    sloth_plugins.activate("1")
    trainer.evaluate()
    assert CALLS == ["inner", "unit"]


def test_training_again_and_preparing_say_nothing_new(declare, make, capsys):
    declare()
    trainer = make()
    sloth_plugins.activate("1")
    trainer.train()
    kind = type(trainer)
    assert capsys.readouterr().err.count("toy:first") == 1
    trainer.train()
    trainer.accelerator.prepare(trainer.model)
    assert capsys.readouterr().err == ""
    assert type(trainer) is kind


def test_revert_gives_trainer_and_model_their_classes_back(declare, make):
    declare()
    trainer = make()
    sloth_plugins.activate("1")
    trainer.train()
    assert sloth_plugins.revert(trainer.model) == 8
    assert type(trainer) is ToyTrainer
    CALLS.clear()
    trainer.train()
    again = make(network=trainer.model)
    again.train()
    assert CALLS == []
    assert type(again) is ToyTrainer


def test_reverting_what_a_trainers_model_wraps_restores_the_trainer(declare, make):
    from peft import LoraConfig, get_peft_model

    declare()
    base = model()
    trainer = make(network=get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])))
    sloth_plugins.activate("1")
    trainer.train()
    assert application.patched(trainer) is not None
    sloth_plugins.revert(base)
    assert type(trainer) is ToyTrainer


def test_a_trainer_of_another_model_keeps_its_patches(declare, make):
    declare()
    one, other = make(), make()
    for trainer in (one, other):
        sloth_plugins.patch(trainer.model, trainer=trainer)
    sloth_plugins.revert(one.model)
    assert application.patched(one) is None
    assert application.patched(other) is not None


@pytest.mark.parametrize("selection", ["llama", "llama:rms_norm", "1,-toy", "1,-*:first", "1,-toy_all:first", "*:rope"])
def test_selections_that_leave_trainers_stock(declare, make, selection):
    declare()
    trainer = make()
    report = sloth_plugins.patch(trainer.model, selection, trainer=trainer)
    assert of_trainers(report) == [("first", "off", 0)]
    assert type(trainer) is ToyTrainer


@pytest.mark.parametrize("selection", ["1", "*", "toy", "toy_all", "toy:first", "*:first", "-llama", "llama,toy:fir*"])
def test_selections_that_take_trainers(declare, make, selection):
    declare()
    trainer = make()
    report = sloth_plugins.patch(trainer.model, selection, trainer=trainer)
    assert of_trainers(report) == [("first", "applied", 1)]
    assert report.changed == 1 + sum(1 for _ in application.patched_modules(trainer.model))


@pytest.mark.parametrize(("text", "said"), [("tyo", "did you mean 'toy'"), ("toy:frist", "did you mean 'first'")])
def test_a_typo_gets_the_nearest_name(declare, text, said):
    declare()
    with pytest.raises(SlothError, match=said):
        sloth_plugins.activate(text)


def test_a_trainer_that_is_not_meant_is_not_mentioned(declare, make):
    declare(patch(), patch("absent", target="toy_absent.module:Trainer"))
    other, toy = make(OtherTrainer), make()
    assert of_trainers(sloth_plugins.patch(other.model, trainer=other)) == []
    assert type(other) is OtherTrainer
    assert of_trainers(sloth_plugins.patch(toy.model, trainer=toy)) == [("first", "applied", 1)]
    assert "toy_absent" not in sys.modules


def test_a_class_that_was_elsewhere_is_found_by_its_former_path(declare, make):
    declare(patch(target="toy_trainers.new:ToyTrainer", formerly=("toy_trainers.old:ToyTrainer", TOY)))
    trainer = make(DerivedTrainer)
    assert of_trainers(sloth_plugins.patch(trainer.model, trainer=trainer)) == [("first", "applied", 1)]
    assert type(trainer).__name__ == "DerivedTrainer"


def test_several_patches_compose_and_one_can_be_taken_away(declare, make):
    declare(patch("first", "inner"), patch("second", "outer"))
    trainer = make()
    wanted = {"1": ["outer", "inner", "unit"], "1,-*:first": ["outer"], "toy:first": ["inner", "unit"]}
    for selection, calls in wanted.items():
        sloth_plugins.patch(trainer.model, selection, trainer=trainer)
        CALLS.clear()
        trainer.shape(torch.ones(()))
        assert calls == CALLS
        assert type(trainer).__mro__[1] is ToyTrainer
    assert sloth_plugins.patch(trainer.model, "toy:first", trainer=trainer).changed == 0


def test_by_hand_a_trainer_that_is_not_given_runs_stock(declare, make):
    declare()
    trainer = make()
    sloth_plugins.activate("1")
    sloth_plugins.patch(trainer.model)
    trainer.train()
    assert CALLS == []
    sloth_plugins.patch(trainer.model, trainer=trainer)
    trainer.train()
    assert CALLS == ["inner", "unit"]
    sloth_plugins.patch(trainer.model)
    assert type(trainer) is ToyTrainer


def test_off_takes_a_trainers_patches_away(declare, make):
    declare()
    trainer = make()
    sloth_plugins.patch(trainer.model, trainer=trainer)
    sloth_plugins.patch(trainer.model, "off", trainer=trainer)
    assert type(trainer) is ToyTrainer
    sloth_plugins.patch(trainer.model, trainer=trainer)
    sloth_plugins.patch(trainer.model, "off")
    assert type(trainer) is ToyTrainer


@pytest.mark.parametrize("wrong", [3, "another"])
def test_a_trainer_of_something_else_is_refused_in_one_line(declare, make, wrong):
    declare()
    with pytest.raises(SlothError, match="takes the trainer of this model") as caught:
        sloth_plugins.patch(model(), trainer=make() if wrong == "another" else wrong)
    assert "\n" not in str(caught.value)


def test_a_model_of_an_unknown_architecture_has_a_trainer_all_the_same(declare, make, capsys):
    declare()
    trainer = make(network=model("gpt2"))
    sloth_plugins.activate("1")
    trainer.train()
    said = capsys.readouterr().err
    assert re.search(r"toy:first +1 +applied", said)
    assert "no architecture covers model type 'gpt2'" in said
    assert CALLS == ["inner", "unit"]


def test_what_is_selected_for_no_part_of_it_is_said_of_the_model(declare, make, capsys):
    declare()
    sloth_plugins.activate("qwen")
    make().train()
    assert "nothing that is selected is for this model, which is llama; it stays stock" in capsys.readouterr().err


def test_a_frozen_model_has_a_stock_trainer(declare, make):
    declare()
    trainer = make(network=model().requires_grad_(False))
    sloth_plugins.activate("1")
    trainer.evaluate()
    assert CALLS == []
    assert type(trainer) is ToyTrainer


def test_an_interrupted_application_leaves_model_and_trainer_stock(declare, make, monkeypatch):
    declare()
    trainer = make()
    real = application._swap

    def interrupted(changed, kind, bound):
        if changed is trainer and kind is not ToyTrainer:
            raise KeyboardInterrupt
        real(changed, kind, bound)

    monkeypatch.setattr(application, "_swap", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sloth_plugins.patch(trainer.model, trainer=trainer)
    assert type(trainer) is ToyTrainer
    assert not any(application.patched_modules(trainer.model))


def test_a_class_that_was_changed_after_the_patch_is_an_error(declare, make):
    declare()
    trainer = make()
    sloth_plugins.patch(trainer.model, trainer=trainer)
    kind = type(trainer)
    trainer.__class__ = type("Around", (kind,), {})
    with pytest.raises(SlothError, match="the class of a Around was changed after it was patched"):
        sloth_plugins.revert(trainer.model)
    trainer.__class__ = kind
    sloth_plugins.revert(trainer.model)
    assert type(trainer) is ToyTrainer


def test_a_trainer_is_not_kept_alive_and_a_copy_is_stock(declare, make):
    declare()
    trainer = make()
    sloth_plugins.patch(trainer.model, trainer=trainer)
    assert type(copy.copy(trainer)) is ToyTrainer
    alive, network = weakref.ref(trainer), trainer.model
    del trainer
    gc.collect()
    assert alive() is None
    assert list(trainers.trainers_of(network)) == []


def test_the_list_shows_the_trainers_class(declare):
    declare(patch(summary="halves in one go"))
    (entry,) = [entry for entry in json.loads(as_json_text(discovery.plugins())) if entry["architecture"] == "toy"]
    assert entry["model_types"] == ["ToyTrainer"]
    assert (entry["patch"], entry["plugin"], entry["summary"]) == ("first", "toy", "halves in one go")

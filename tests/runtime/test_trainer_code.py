"""Patches of trainers: code that is not upstream's own, or not as tested, or that the user has put in its place."""

import sys

import pytest
import torch
from toy_patches import CALLS, model, of_trainers, patch, toy_outcomes
from toy_trainers import ToyTrainer
from transformers import Trainer

import sloth_plugins
from sloth_plugins import application, discovery
from sloth_plugins.errors import SlothError
from sloth_plugins.fingerprint import fingerprint
from sloth_plugins.registry import Patch, Skip


class MyTrainer(ToyTrainer):
    def shape(self, loss):
        return 10 * super().shape(loss)


class Mixin:
    @staticmethod
    def unit(loss):
        return 3 * loss


class MixedTrainer(Mixin, ToyTrainer):
    pass


def test_a_method_of_the_users_own_is_wrapped(declare, make):
    declare(patch(replacement="outer"))
    trainer = make(MyTrainer)
    sloth_plugins.patch(trainer.model, trainer=trainer)
    assert float(trainer.shape(torch.ones(()))) == 10
    assert CALLS == ["outer"]
    assert isinstance(trainer, MyTrainer)


def test_a_method_of_the_users_own_is_not_hidden(declare, make):
    kind, said = MixedTrainer, "Mixin has its own unit"
    declare()
    trainer = make(kind)
    report = sloth_plugins.patch(trainer.model, trainer=trainer)
    assert [outcome.reason for outcome in toy_outcomes(report)] == [said]
    assert type(trainer) is kind
    with pytest.raises(SlothError, match=f"toy:first was asked for by name and cannot run: {said}"):
        sloth_plugins.patch(trainer.model, "1,toy:first", trainer=trainer)


def test_a_method_that_the_user_set_on_the_trainer_is_not_passed_by(declare, make):
    declare()
    trainer = make()
    trainer.shape = lambda loss: loss
    (outcome,) = toy_outcomes(sloth_plugins.patch(trainer.model, trainer=trainer))
    assert outcome.reason == f"shape of this ToyTrainer was replaced by {__name__}"


def test_a_method_that_somebody_replaced_in_the_class_is_not_upstreams(declare, make, monkeypatch):
    declare()
    monkeypatch.setattr(ToyTrainer, "unit", staticmethod(lambda loss: loss))
    trainer = make()
    (outcome,) = toy_outcomes(sloth_plugins.patch(trainer.model, trainer=trainer))
    assert outcome.reason == f"ToyTrainer.unit was replaced by {__name__}"


def test_a_named_patch_that_cannot_run_ends_the_process_and_changes_nothing(declare, make, capsys):
    declare()
    trainer = make(MixedTrainer)
    sloth_plugins.activate("1,toy:first")
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 2
    assert "Mixin has its own unit" in capsys.readouterr().err
    assert not any(application.patched_modules(trainer.model))


def by_hand(trainer, selection="1"):
    report = sloth_plugins.patch(trainer.model, selection, trainer=trainer)
    return next(iter(toy_outcomes(report)))


def test_code_that_a_patch_names_must_exist(declare, make):
    declare(patch(replaces=("toy_trainers:halve", "toy_trainers:quarter | toy_trainers:ToyTrainer.quarter")))
    outcome = by_hand(make())
    assert outcome.state == "skipped"
    assert "toy_trainers:quarter | toy_trainers:ToyTrainer.quarter" in outcome.reason
    assert "does not exist" in outcome.reason


def test_the_first_alternative_that_exists_counts(declare, make):
    known = fingerprint(ToyTrainer.shape, ToyTrainer)
    alternatives = "toy_nowhere:f | test_trainers:ToyTrainer.shape | toy_trainers:ToyTrainer.shape"
    declare(patch(replaces=(alternatives,), fingerprints=(known,)))
    assert by_hand(make()).state == "applied"


@pytest.mark.parametrize(
    "entry", ["toy_trainers:halve", "toy_trainers:ToyTrainer.shape", "toy_trainers:ToyTrainer.unit"]
)
def test_code_that_is_not_as_tested_is_left_alone_unless_named(declare, make, entry):
    declare(patch(replaces=(entry,), fingerprints=("0" * 16,)))
    trainer = make()
    name = entry.partition(":")[2]
    outcome = by_hand(trainer)
    assert outcome.state == "skipped"
    assert f"{name} is not as tested" in outcome.reason
    assert "SLOTH_PLUGINS=1,toy:first applies it all the same" in outcome.reason
    outcome = by_hand(trainer, "toy:first")
    assert outcome.state == "applied"
    assert outcome.reason.startswith(f"untested: {name}")


def test_code_that_somebody_replaced_is_not_upstreams(declare, make, monkeypatch):
    monkeypatch.setattr("toy_trainers.halve", lambda loss: loss)
    sys.modules["toy_trainers"].halve.__module__ = "toy_trainers"
    declare(patch(replaces=("toy_trainers:halve",)))
    assert by_hand(make()).reason == f"halve was replaced by {__name__}"


def test_a_model_patch_may_name_code_too(declare, make):
    norm = "transformers.models.llama.modeling_llama:LlamaRMSNorm"
    spec = discovery.Plugins(load_entry_points=False).architectures["llama"].patches[0]
    extra = Patch(name="needy", target=norm, replacement=spec.replacement, replaces=("toy_trainers:gone",))
    declare(sloth_patches=lambda architecture: [extra] if architecture.name == "llama" else [])
    report = sloth_plugins.patch(model(), "llama:need*")
    assert [o.reason for o in report.outcomes if o.patch == "needy"] == [
        "toy_trainers:gone, which it stands in for, does not exist"
    ]


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("nothing", "has nothing to replace in ToyTrainer"),
        ("failing", "raised KeyError: 'oops'"),
        ("unknown", "ToyTrainer has no method reshape"),
        ("not_static", "for unit, which is another kind"),
        ("no_function", "returned 3 for shape"),
        ("narrower", "does not fit the signature of ToyTrainer.shape: it lacks parameter 'factor'"),
        ("absent", "does not exist"),
    ],
)
def test_a_factory_that_does_not_fit_is_told(declare, make, factory, said):
    declare(patch(replacement=factory))
    trainer = make()
    outcome = by_hand(trainer)
    assert outcome.state == "skipped"
    assert said in outcome.reason
    assert type(trainer) is ToyTrainer


def test_requirements_and_the_trainers_args_are_asked(declare, make):
    declare(patch(requires=("nowhere>=1",)), patch("second", "outer", where={"max_steps": (7,)}))
    trainer = make()
    report = sloth_plugins.patch(trainer.model, trainer=trainer)
    reasons = [outcome.reason for outcome in toy_outcomes(report)]
    assert reasons == ["version: needs nowhere>=1, found not installed", "config.max_steps: needs 7, found 1"]
    trainer.args.max_steps = 7
    assert of_trainers(sloth_plugins.patch(trainer.model, trainer=trainer))[1] == ("second", "applied", 1)


def test_a_spec_has_requirements_for_all_its_patches(declare, make):
    declare(requires=("torch<2",))
    assert by_hand(make()).reason.startswith("version: needs torch<2, found 2")


def test_a_plugin_may_refuse_or_drop_a_trainer_patch(declare, make):
    declare(sloth_check=lambda patch, module: Skip("not here") if isinstance(module, Trainer) else None)
    assert by_hand(make()).reason == "not here"
    declare(sloth_adjust_plan=lambda plan: plan.items.clear() if plan.items[0].family == "toy" else None)
    trainer = make()
    assert of_trainers(sloth_plugins.patch(trainer.model, trainer=trainer)) == []

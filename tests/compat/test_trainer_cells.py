"""Cells of trainer patches: every trainer of a recipe trains, and a patch that changes anything is caught, by name."""

import contextlib
import functools
import io
import types

import cells
import datasets
import lock
import pytest
import torch
import trainers
from trl import SFTTrainer
from trl.trainer import sft_trainer

import sloth_plugins
from sloth_plugins import discovery
from sloth_plugins.discovery import Plugins
from sloth_plugins.fingerprint import fingerprint
from sloth_plugins.registry import Experimental, Patch, TrainerSpec, hookimpl

pytestmark = pytest.mark.filterwarnings("ignore")

SFT = "trl.trainer.sft_trainer:SFTTrainer"
MODULES = {
    "SFT": "trl.trainer",
    "DPO": "trl.trainer",
    "KTO": "trl.trainer",
    "GRPO": "trl.trainer",
    "RLOO": "trl.trainer",
    "Reward": "trl.trainer",
}
FILES = {"OnlineDPO": "online_dpo"}


def changing(**methods):
    def factory(trainer):
        def wrapped(name):
            original, change = getattr(trainer, name), methods[name]

            @functools.wraps(original)
            def method(self, *args, **kwargs):
                return change(original(self, *args, **kwargs))

            return method

        return {name: wrapped(name) for name in methods}

    return factory


same = changing(compute_loss=lambda loss: loss)
doubled = changing(compute_loss=lambda loss: loss * 2)
near = changing(compute_loss=lambda loss: loss + 3e-4 * (loss - loss.detach()))


def leaking(trainer):
    def leak(loss):
        sft_trainer.get_dataset_column_names = functools.partial(sft_trainer.get_dataset_column_names)
        return loss

    return changing(compute_loss=leak)(trainer)


def narrower(trainer):
    return {"compute_loss": lambda self, model, inputs: None}


@pytest.fixture
def run(monkeypatch):
    """The cell of a patch of TRL's SFTTrainer, that upstream's code being recorded."""
    datasets.disable_progress_bars()
    code = fingerprint(SFTTrainer.compute_loss, SFTTrainer)
    path = f"{SFT}.compute_loss"
    recorded = {"objects": {path: {code: "1.0"}}, "sources": {code: ["pass"]}}
    monkeypatch.setattr(lock, "read", lambda: recorded)

    def ran(factory="same", **changes):
        given = {"target": SFT, "replacement": f"{__name__}:{factory}", "replaces": (path,), **changes}
        spec = TrainerSpec(name="toy_sft", family="toy", patches=(Patch(name="toy", **given),))
        module = types.ModuleType("toy")
        module.sloth_trainers = hookimpl(function=lambda: [spec], specname="sloth_trainers")
        entry = types.SimpleNamespace(name="toy", value="toy", load=lambda: module)
        monkeypatch.setattr(discovery, "entry_points", lambda group: [entry])
        discovery.plugins.cache_clear()
        matrix = cells.Matrix()
        matrix.plugins = Plugins()
        assert ("toy_sft", "toy_sft", "toy") in matrix.names()
        with contextlib.redirect_stdout(io.StringIO()):
            return matrix.run("toy_sft", "toy_sft", "toy")

    yield ran
    monkeypatch.undo()
    discovery.plugins.cache_clear()


def test_a_patch_that_changes_nothing_is_green(run):
    found = run()
    assert (found.model_type, found.patch) == ("toy_sft", "toy")
    assert (found.state, found.failed, found.reason, found.diff) == ("green", [], "", "")


def test_another_loss(run):
    assert run("doubled").failed == ["losses", "gradients"] * 2


def test_other_gradients_of_the_same_loss(run):
    found = run("near")
    assert set(found.failed) >= {"gradients"}
    assert "from stock with adapters" in found.reason


def test_a_function_of_trl_that_stays_replaced(run, monkeypatch):
    monkeypatch.setattr(sft_trainer, "get_dataset_column_names", sft_trainer.get_dataset_column_names)
    found = run("leaking")
    assert found.failed == ["revert", "revert"]
    assert "trl.trainer.sft_trainer.get_dataset_column_names of TRL changed" in found.reason


def test_a_revert_that_forgets_the_trainer(run, monkeypatch):
    monkeypatch.setattr(sloth_plugins, "revert", lambda model: 0, raising=False)
    assert run().failed == ["revert", "revert"]


def test_code_that_nobody_recorded(run):
    found = run(replaces=("trl.trainer.sft_trainer:SFTTrainer.log",))
    assert found.failed == ["fingerprint"]
    assert "def log(" in found.diff


def test_code_that_is_gone(run):
    found = run(replaces=("trl.trainer.sft_trainer:gone | trl.trainer.utils:gone",))
    assert found.failed == ["target"]
    assert "gone" in found.reason


def test_a_method_with_another_signature(run):
    found = run("narrower")
    assert found.failed == ["signature"]
    assert "SFTTrainer.compute_loss" in found.reason


def test_versions_and_classes_that_are_not_here(run):
    old = run(requires=("trl<0.1",))
    assert (old.state, old.failed) == ("unsupported", [])
    assert old.reason.startswith("needs trl<0.1, found ")
    for target in ("trl.experimental.gone.gone_trainer:GoneTrainer", "trl.trainer.sft_trainer:GoneTrainer"):
        gone = run(target=target)
        assert (gone.state, gone.failed, gone.reason) == ("unsupported", [], "GoneTrainer does not exist")


def test_a_module_that_lacks_what_it_imports_is_no_module_that_is_not_here(run, tmp_path, monkeypatch):
    (tmp_path / "needy_trainer.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = run(target="needy_trainer:NeedyTrainer")
    assert found.failed == ["target"]
    assert "No module named 'surely_not_installed'" in found.reason


def test_a_trainer_without_a_recipe_is_not_green(run, monkeypatch):
    monkeypatch.delitem(trainers.RECIPES, "SFTTrainer")
    found = run()
    assert (found.state, found.reason) == ("experimental", "SFTTrainer is not trained in the matrix")
    assert run(replaces=("trl.trainer.sft_trainer:SFTTrainer.log",)).state == "red"


def test_an_experimental_patch_says_so(run):
    found = run(status=Experimental("tried once"))
    assert (found.state, found.reason, found.failed) == ("experimental", "tried once", [])


NAMES = [name.removesuffix("Trainer") for name in trainers.RECIPES if name != "Trainer"]


@pytest.mark.slow
# By turns: the matrix runs each with both.
@pytest.mark.parametrize(("name", "adapters"), [(name, i % 2 == 1) for i, name in enumerate(NAMES)])
def test_a_recipe_trains_its_trainer_and_twice_alike(name, adapters, tmp_path):
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    file = FILES.get(name, name.lower())
    package = MODULES.get(name, f"trl.experimental.{file}")
    module = pytest.importorskip(f"{package}.{file}_trainer", exc_type=ImportError)
    kind = getattr(module, f"{name}Trainer")
    with contextlib.redirect_stdout(io.StringIO()):
        first, second = (trainers.train(trainers.build(kind, str(tmp_path), adapters=adapters), "") for _ in range(2))
    assert len(first.losses) == len(first.gradients) == trainers.STEPS
    assert first.losses == second.losses
    for step in first.gradients:
        assert any(name.startswith("base_model") for name in step) == adapters
        assert sum(float(grad.norm()) ** 2 for grad in step.values()) > 1e-6

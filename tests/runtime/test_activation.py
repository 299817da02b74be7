"""The flag in one process: bad input, what is said at exit, and what a seam does with a model."""

import sys

import pytest
import torch
from launching import python
from transformers import AutoConfig, AutoModelForCausalLM

import sloth_plugins
from sloth_plugins import activation, seams
from sloth_plugins.application import patched

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_key_value_heads=1, **TINY))


def count(model):
    return sum(patched(module) is not None for module in model.modules())


def prepare(*models, **arguments):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(*models, **arguments)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("lama", "did you mean 'llama'"),
        ("llama:ropes", "did you mean 'rope'"),
        ("llama,,", "empty term"),
        ("llama rope", "'llama rope'"),
        ("1,off", "cannot be combined"),
    ],
)
def test_a_mistake_in_the_flag_ends_import_torch_with_one_line(flag, said, tmp_path):
    done = python("import torch; print('never')", tmp_path, flag=flag)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_nothing_reached_a_seam_is_said_at_exit(tmp_path):
    done = python("import torch", tmp_path, flag="1")
    assert done.returncode == 0
    assert "SLOTH_PLUGINS='1' was set, but in this process no model entered" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("code", ["raise ValueError('mine')", "raise KeyboardInterrupt"])
def test_an_exception_is_the_better_message(code, tmp_path):
    done = python(f"import torch\n{code}", tmp_path, flag="1")
    assert done.returncode != 0
    assert "sloth-plugins" not in done.stderr


def test_only_the_main_process_speaks(tmp_path):
    assert "sloth-plugins" not in python("import torch", tmp_path, flag="1", RANK="1", WORLD_SIZE="2").stderr


def test_a_worker_process_of_a_loader_is_silent(tmp_path):
    code = (
        "import multiprocessing, sys\nimport torch\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=print)\n"
        "    process.start(); process.join(); sys.last_type = None\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    done = python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", tmp_path, flag="1")
    assert done.stderr.count("no model entered") == 1


def test_a_seam_patches_reports_once_and_is_idempotent(model, capsys):
    sloth_plugins.activate("1")
    prepare(model)
    first = capsys.readouterr().err
    prepare(model)
    assert first.count("llama:rms_norm       3        applied") == 1
    assert capsys.readouterr().err == ""
    assert count(model) == 8


def test_after_deactivate_the_seams_are_upstreams_own(model):
    from accelerate import Accelerator
    from transformers import Trainer

    before = [vars(Trainer)["train"], vars(Accelerator)["prepare"], vars(Accelerator)["prepare_model"]]
    sloth_plugins.activate("1")
    assert vars(Trainer)["train"] is not before[0]
    sloth_plugins.deactivate()
    assert [vars(Trainer)["train"], vars(Accelerator)["prepare"], vars(Accelerator)["prepare_model"]] == before
    prepare(model)
    assert count(model) == 0
    assert not any(type(finder).__module__.startswith("sloth_plugins") for finder in sys.meta_path)


def test_a_frozen_model_stays_stock(model, capsys):
    sloth_plugins.activate("1")
    prepare(model.requires_grad_(False))
    assert count(model) == 0
    assert "has nothing to train and stays stock" in capsys.readouterr().err


def test_a_reference_model_prepared_for_evaluation_stays_stock(model, capsys):
    from accelerate import Accelerator

    sloth_plugins.activate("1")
    Accelerator(cpu=True).prepare_model(model, evaluation_mode=True)
    assert count(model) == 0
    Accelerator(cpu=True).prepare_model(model)
    assert count(model) == 8


def test_a_model_that_was_reverted_is_left_alone(model, capsys):
    sloth_plugins.activate("1")
    prepare(model)
    sloth_plugins.revert(model)
    prepare(model)
    assert count(model) == 0
    assert "was reverted and trains stock" in capsys.readouterr().err
    sloth_plugins.patch(model)
    prepare(model)
    assert count(model) == 8


def test_something_that_is_no_transformers_model_trains_stock(capsys):
    sloth_plugins.activate("1")
    prepare(torch.nn.Linear(2, 2))
    assert "Linear holds no model with a config.model_type" in capsys.readouterr().err


def test_what_was_chosen_by_hand_stays(model, capsys):
    sloth_plugins.activate("1")
    sloth_plugins.patch(model, "llama:rope")
    prepare(torch.nn.Sequential(model))
    assert count(model) == 1
    assert capsys.readouterr().err == ""
    sloth_plugins.revert(model)
    prepare(model)
    assert count(model) == 0


def test_a_model_that_holds_a_reverted_one_is_left_alone(model, capsys):
    sloth_plugins.activate("1")
    prepare(model)
    sloth_plugins.revert(model)
    around = torch.nn.Sequential(model, torch.nn.Linear(2, 2))
    prepare(around)
    assert count(around) == 0
    sloth_plugins.patch(around)
    assert count(around) == 8
    sloth_plugins.revert(model.model)
    prepare(model)
    assert count(model) == 1  # what computes the loss is no part of model.model


def test_a_compiled_model_is_said_to_run_upstreams_forwards(tmp_path):
    code = "from accelerate import Accelerator\nfrom common import model\nAccelerator(cpu=True{}).prepare(model())"
    line = "torch.compile is on: what it compiles runs upstream's forwards"
    assert line in python(code.format(", dynamo_backend='aot_eager'"), tmp_path, flag="1").stderr
    assert line not in python(code.format(""), tmp_path, flag="1").stderr


def test_a_method_that_upstream_has_moved_is_said_and_imports_go_on(model, capsys, monkeypatch):
    moved = (*seams.SEAMS["transformers.trainer"], ("Trainer", "moved", seams._models_of_trainer))
    monkeypatch.setitem(seams.SEAMS, "transformers.trainer", moved)
    sloth_plugins.activate("1")
    assert "transformers.trainer.Trainer.moved is not what it was" in capsys.readouterr().err
    prepare(model)
    assert count(model) == 8


def test_a_finder_of_the_old_kind_does_not_disturb_the_watcher(tmp_path):
    code = (
        "import sys\nclass Old:\n    def find_module(self, name, path=None): return None\n"
        "sys.meta_path.insert(0, Old())\nimport torch\nfrom transformers import Trainer\nprint('fine')"
    )
    done = python(code, tmp_path, flag="1")
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.parametrize("call", [sloth_plugins.patch, sloth_plugins.revert])
@pytest.mark.parametrize("model", ["a path", None, 3])
def test_something_that_is_no_module_is_refused_in_one_line(call, model):
    with pytest.raises(sloth_plugins.SlothError, match="takes a torch"):
        call(model)


def test_a_selection_that_is_no_text_is_refused_in_one_line(model):
    with pytest.raises(sloth_plugins.SlothError, match="selection is 123, not a text"):
        sloth_plugins.patch(model, 123)


def test_two_models_of_which_one_is_prepared(model):
    sloth_plugins.activate("1")
    other = AutoModelForCausalLM.from_config(model.config)
    prepare(model)
    assert (count(model), count(other)) == (8, 0)


def test_a_failure_of_our_own_leaves_training_unharmed(model, capsys, monkeypatch):
    from sloth_plugins import patching

    def broken(*args, **kwargs):
        raise RuntimeError("a defect of ours")

    monkeypatch.setattr(patching, "examine", broken)
    sloth_plugins.activate("1")
    prepare(model)
    assert "trains stock, since patching it failed: RuntimeError: a defect of ours" in capsys.readouterr().err


def test_a_named_patch_that_cannot_run_ends_the_process(model, capsys):
    model.config.hidden_act = "relu"
    sloth_plugins.activate("llama:glu")
    with pytest.raises(SystemExit) as caught:
        prepare(model)
    assert caught.value.code == 2
    assert "llama:glu was asked for by name and cannot run: config.hidden_act" in capsys.readouterr().err
    assert count(model) == 0


def test_an_old_torch_is_a_reason_and_training_goes_on(model, capsys, monkeypatch):
    from sloth_plugins import environment

    real = environment.installed_version
    monkeypatch.setattr(environment, "installed_version", lambda name: "2.1.0" if name == "torch" else real(name))
    sloth_plugins.activate("1")
    prepare(model)
    assert count(model) == 0
    assert capsys.readouterr().err.count("version: needs torch>=2.8, found 2.1.0") == 6


def test_rivals_in_the_process_are_named(model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", type(sys)("unsloth"))
    sloth_plugins.activate("1")
    prepare(model)
    assert "unsloth rewrites transformers" in capsys.readouterr().err


def test_activating_twice_keeps_one_wrapper_and_the_last_selection(model):
    sloth_plugins.activate("1")
    sloth_plugins.activate("llama:rope")
    prepare(model)
    assert count(model) == 1
    wrapped = [(kind, name) for kind, name, *_ in seams._wrapped]
    assert len(set(wrapped)) == len(wrapped)
    # And the constructors of TRL's trainers, where another test has imported them.
    assert len([name for _, name in wrapped if name != "__init__"]) == 4


def test_a_selection_of_nothing_deactivates(model):
    sloth_plugins.activate("1")
    sloth_plugins.activate("off")
    assert activation._active is None
    prepare(model)
    assert count(model) == 0


def test_patching_a_32_layer_model_takes_less_than_a_second():
    import time

    with torch.device("meta"):
        config = AutoConfig.for_model("llama", num_hidden_layers=32)
        model = AutoModelForCausalLM.from_config(config)
    sloth_plugins.patch(model, "llama:rope")  # imports are not what is timed
    sloth_plugins.revert(model)
    start = time.process_time()  # what others do on this machine is not counted
    report = sloth_plugins.patch(model, "1")
    assert time.process_time() - start < 1
    assert report.changed == 65 + 32 + 32 + 32 + 1 + 1

"""Statistics in the logs of a Trainer: what is added, what stays as it was, and what is told at the end."""

import sys
import time
import types

import pytest
import torch
from tiny_runs import ROW, logged, patched, trainer
from transformers import Trainer, TrainerCallback

import sloth_plugins
from sloth_plugins import application
from sloth_plugins.statistics import meter, picture
from sloth_plugins.statistics import trainer as statistics_patch
from sloth_plugins.statistics.history import MFU, PEAK, PLANNED, SECONDS, SPEED
from sloth_plugins.statistics.picture import FILE

pytestmark = pytest.mark.usefixtures("_one_thread")
OURS = {SECONDS, SPEED, PEAK}


class Reporter(TrainerCallback):
    """What W&B, TensorBoard and trackio are to a Trainer: a callback that is told the logs."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_reporters_and_the_history_get_what_is_added_and_all_that_was_there(tmp_path):
    stock, ours = Reporter(), Reporter()
    before = trainer(tmp_path / "a", callbacks=[stock], eval_strategy="steps", eval_steps=2)
    before.train()
    after = patched(tmp_path / "b", callbacks=[ours], eval_strategy="steps", eval_steps=2)
    after.train()
    assert logged(after) == logged(before)
    assert logged(after, "eval_loss") == logged(before, "eval_loss")
    for old, new in zip(stock.logs, ours.logs, strict=True):
        assert list(new)[: len(old) - 1] == list(old)[:-1]
        assert new.keys() - old.keys() == (OURS if "loss" in old else set())
    assert logged(after, SPEED) == [log[SPEED] for log in ours.logs if SPEED in log]


class Slow(Trainer):
    """Each micro-batch takes its time."""

    def training_step(self, *args, **kwargs):
        time.sleep(0.05)
        return super().training_step(*args, **kwargs)


def test_the_numbers_hold_together(tmp_path, clock):
    made = patched(tmp_path, Slow, max_steps=6, logging_steps=2, gradient_accumulation_steps=2)
    made.train()
    for seconds, speed, peak in zip(*(logged(made, name) for name in (SECONDS, SPEED, PEAK)), strict=True):
        # Two micro-batches of four rows.
        assert seconds == pytest.approx(2 * 0.05)
        assert speed == pytest.approx(8 * len(ROW) / 0.1)
        assert peak == pytest.approx(meter.peak_bytes(torch.device("cpu")) / 2**30, rel=0.2)
    assert not logged(made, MFU)
    assert not logged(made, PLANNED)


def test_evaluation_and_saving_are_no_training(tmp_path, clock):
    class Saving(Slow):
        def _save_checkpoint(self, *args, **kwargs):
            time.sleep(3)
            return super()._save_checkpoint(*args, **kwargs)

    def metrics(prediction):
        time.sleep(0.5)
        return {}

    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    made = patched(tmp_path, Saving, compute_metrics=metrics, **options)
    made.train()
    assert len(logged(made, "eval_loss")) == 4
    assert logged(made, SECONDS) == pytest.approx([0.05] * 4)


def test_mfu_is_what_is_needed_of_the_cards_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(meter, "_peak_flops", lambda model, args: 1e9)
    made = patched(tmp_path)
    made.train()
    found = meter.needed(made.model)
    rows = 4
    flops = found.of(rows * len(ROW), rows * (len(ROW) - 1), {None: rows * len(ROW) * (len(ROW) + 1) // 2})
    for seconds, mfu in zip(logged(made, SECONDS), logged(made, MFU), strict=True):
        assert mfu == pytest.approx(flops / seconds / 1e9, rel=2e-2)


def test_planned_memory_is_logged(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, meter._PLANS, types.SimpleNamespace(stacks_of=plans))
    made = patched(tmp_path)
    made.train()
    assert logged(made, PLANNED) == [3.0] * 4


def plans(model):
    """Three backbones, of which one has not run yet."""
    sizes = ((None, 9), ("a plan", 3), ("a plan", 1))
    return [types.SimpleNamespace(current=current, predicted=size * 2**30) for current, size in sizes]


def test_a_table_and_a_picture_at_the_end(tmp_path, capsys):
    patched(tmp_path, eval_strategy="steps", eval_steps=2).train()
    told = capsys.readouterr().err
    assert "sloth-plugins: 4 steps in" in told
    for row in ("training loss", "eval loss", "time a step", "tokens a second", "peak memory", f"drawn in {tmp_path}"):
        assert row in told
    assert (tmp_path / FILE).read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if "sloth" in path.name] == [FILE]


def test_a_run_that_logs_nothing_is_quiet(tmp_path, capsys):
    patched(tmp_path, logging_steps=100).train()
    assert capsys.readouterr().err == ""
    assert not (tmp_path / FILE).exists()


def test_other_ranks_are_quiet(tmp_path, capsys, monkeypatch):
    made = patched(tmp_path)
    made.is_world_process_zero = lambda: False
    made.train()
    assert capsys.readouterr().err == ""
    assert not (tmp_path / FILE).exists()


def test_a_picture_of_somebody_else_stays(tmp_path, capsys):
    (tmp_path / FILE).write_bytes(b"mine")
    patched(tmp_path).train()
    assert (tmp_path / FILE).read_bytes() == b"mine"
    assert "is none of ours" in capsys.readouterr().err


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(picture.importlib.util, "find_spec", lambda name: None)
    patched(tmp_path).train()
    told = capsys.readouterr().err
    assert "pip install 'sloth-plugins[plots]'" in told
    assert "training loss" in told


def test_a_failure_of_ours_is_told_and_ends_no_training(tmp_path, capsys, monkeypatch):
    def fail(self, step):
        raise RuntimeError("no clock")

    monkeypatch.setattr(meter.Meter, "read", fail)
    made = patched(tmp_path)
    made.train()
    told = capsys.readouterr().err
    assert told.count("sloth-plugins") == 1
    assert "training statistics end here, since they failed: RuntimeError: no clock" in told
    assert len(logged(made)) == 4


def test_a_pattern_is_named_while_it_trains(tmp_path, capsys):
    class Stuck(Trainer):
        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs) * 0 + 2.0

    patched(tmp_path, Stuck, max_steps=40).train()
    assert capsys.readouterr().err.count("the training loss has not fallen, from 2.000 to 2.000") == 1


def test_a_run_that_is_resumed_is_watched_from_its_beginning(tmp_path, capsys):
    """Its last part alone may well be flat."""

    class Falling(Trainer):
        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs) * 0 + max(3 - self.state.global_step / 10, 1.0)

    patched(tmp_path, Falling, max_steps=60, save_strategy="steps", save_steps=30).train()
    again = patched(tmp_path, Falling, max_steps=60)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-30"))
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == list(range(1, 61))
    assert "has not fallen" not in capsys.readouterr().err


def test_evaluation_while_training_leaves_all_patches_in_place(tmp_path, capsys):
    """It is where a model may enter, so the trainer is looked at again while async_step has its own methods there."""
    seen = []

    class Looking(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append({binding.patch.name for binding in application.patched(made).bindings})
            control.should_evaluate = True

    sloth_plugins.activate("1")
    made = trainer(tmp_path, callbacks=[Looking()])
    made.train()
    assert seen == [{"bookkeeping", "async_step", "memory_plans", "statistics"}] * 4
    assert len(logged(made, "eval_loss")) == 4
    assert len(logged(made, SPEED)) == 4
    told = capsys.readouterr().err
    assert told.count("trainer:async_step") == 1
    assert "was replaced" not in told


def test_it_is_taken_back(tmp_path, capsys):
    made = patched(tmp_path)
    sloth_plugins.revert(made.model)
    made.train()
    assert type(made) is Trainer
    assert not logged(made, SPEED)
    assert capsys.readouterr().err == ""


def test_it_is_on_by_default_and_can_be_left_out(tmp_path):
    for selection, expected in (("1", "applied"), ("1,-trainer:statistics", "off")):
        made = trainer(tmp_path)
        report = sloth_plugins.patch(made.model, selection, trainer=made)
        assert [o.state for o in report.outcomes if o.patch == "statistics"] == [expected]


def test_a_training_that_is_interrupted_leaves_nothing_behind(tmp_path, monkeypatch):
    made = patched(tmp_path)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(made, "compute_loss", fail)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert statistics_patch._runs == {}

"""Where the time of a step goes when a trainer samples: each phase once, and only while it trains."""

import time

import pytest
import torch
from tiny_runs import logged, patched
from transformers import Trainer

import sloth_plugins
from sloth_plugins.statistics import trainer as statistics_patch
from sloth_plugins.statistics.history import PHASES, SAMPLED, SECONDS
from sloth_plugins.statistics.phases import Phases

pytestmark = pytest.mark.usefixtures("_one_thread")
NAMES = [f"{phase}_seconds" for phase in PHASES]


def test_a_phase_within_another_takes_its_time_from_it(clock):
    found = Phases(torch.device("cpu"))
    clock.sleep(16)  # what comes before is no phase
    found.enter("loss")
    clock.sleep(1)
    found.enter("rollout")
    clock.sleep(2)
    found.enter("rollout")
    clock.sleep(4)
    found.enter("sync")
    clock.sleep(8)
    for _ in range(3):
        found.leave()
    clock.sleep(32)
    found.leave()
    clock.sleep(64)
    assert found.read() == {"rollout": 6.0, "sync": 8.0, "loss": 33.0}
    assert found.read() == {}


def test_a_phase_that_is_open_at_a_log_goes_on(clock):
    found = Phases(torch.device("cpu"))
    found.enter("loss")
    clock.sleep(1)
    assert found.read() == {"loss": 1.0}
    clock.sleep(2)
    found.leave()
    assert found.read() == {"loss": 2.0}


def test_nothing_is_kept_where_nothing_is_logged():
    found = Phases(torch.device("cpu"))
    for _ in range(100):
        found.enter("loss")
        found.leave()
    assert len(found._marks) == 1


def test_the_device_is_waited_for_only_where_it_is_read(clock, monkeypatch):
    """Its events, of a device that is done with nothing until somebody waits for it."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.is_done = False

        def record(self, stream):
            self.at = clock.now

        def query(self):
            return self.is_done

        def synchronize(self):
            for mark in list(found._marks):
                mark[1].is_done = True

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    found = Phases(torch.device("cuda", 0))
    found.enter("loss")
    clock.sleep(3)
    found.leave()
    assert found._sums == {}
    assert found.read() == {"loss": 3.0}


class Sampling(Trainer):
    """A trainer with TRL's methods, of which each takes its time."""

    vllm_generation = None

    def training_step(self, *args, **kwargs):
        self._generate_and_score_completions()
        time.sleep(0.01)
        return super().training_step(*args, **kwargs)

    def _generate_and_score_completions(self):
        if self.vllm_generation is not None:
            self.vllm_generation.sync_weights()
        time.sleep(0.02)
        self._calculate_rewards()
        with torch.no_grad():
            self._get_per_token_logps_and_entropies()
        self._get_per_token_logps_and_entropies()
        return {"completion_mask": torch.ones(3, 5)}

    def _calculate_rewards(self):
        time.sleep(0.03)

    def _get_per_token_logps_and_entropies(self):
        time.sleep(0.01)

    def prediction_step(self, *args, **kwargs):
        self._generate_and_score_completions()
        return super().prediction_step(*args, **kwargs)


class Renamed(Trainer):
    """As of a version whose methods have other names."""

    def training_step(self, *args, **kwargs):
        self._generate()
        self._rewards_of_another_name()
        return super().training_step(*args, **kwargs)

    def _generate(self):
        time.sleep(0.01)

    def _rewards_of_another_name(self):
        time.sleep(0.01)


class Engine:
    """What has the weights elsewhere."""

    def sync_weights(self):
        time.sleep(0.02)


def shown(made):
    return [name for name in NAMES if logged(made, name)]


def test_each_phase_is_logged(tmp_path, capsys, clock):
    made = patched(tmp_path, Sampling, gradient_accumulation_steps=2, logging_steps=2)
    made.vllm_generation = Engine()
    made.train()
    # Of two micro-batches, and each without what is within it.
    expected = {"rollout": 0.06, "sync": 0.04, "reference": 0.02, "reward": 0.06, "loss": 0.02}
    entries = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert {phase: entry[f"{phase}_seconds"] for phase in PHASES} == pytest.approx(expected)
        assert entry[SECONDS] == pytest.approx(sum(expected.values()))
        assert entry[SAMPLED] == pytest.approx(2 * 15 / 0.06)
    assert "where it went    rollout " in capsys.readouterr().err


def test_evaluation_is_no_phase(tmp_path, clock):
    made = patched(tmp_path, Sampling, eval_strategy="steps", eval_steps=1)
    made.train()
    assert len(logged(made, "eval_loss")) == 4
    # That of one training step, and not of the two micro-batches that are evaluated.
    assert logged(made, "reward_seconds") == pytest.approx([0.03] * 4)
    assert logged(made, SECONDS) == pytest.approx([0.08] * 4)


def test_methods_of_other_names_are_not_shown(tmp_path, capsys):
    made = patched(tmp_path, Renamed)
    made.train()
    assert shown(made) == ["rollout_seconds", "loss_seconds"]
    assert not logged(made, SAMPLED)
    told = capsys.readouterr().err
    assert "where it went    rollout " in told
    assert "reward" not in told


def test_a_trainer_that_does_not_sample_has_no_phases(tmp_path, capsys):
    made = patched(tmp_path, Trainer)
    made.train()
    assert shown(made) == []
    assert "where it went" not in capsys.readouterr().err
    assert vars(type(made)).keys() & {"training_step", "compute_loss"} == set()


def test_all_of_it_is_taken_back(tmp_path, capsys):
    made = patched(tmp_path, Sampling)
    made.vllm_generation = Engine()
    made.train()
    assert vars(made.vllm_generation) == {}
    sloth_plugins.revert(made.model)
    capsys.readouterr()
    made.state.log_history.clear()
    made.train()
    assert type(made) is Sampling
    assert shown(made) == []
    assert capsys.readouterr().err == ""


def test_a_training_that_fails_while_it_syncs_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "sync_weights", fail)
    made = patched(tmp_path, Sampling)
    made.vllm_generation = Engine()
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert vars(made.vllm_generation) == {}
    assert statistics_patch._runs == {}


def test_a_failure_of_ours_is_told_and_ends_no_training(tmp_path, capsys, monkeypatch):
    def fail(self):
        raise RuntimeError("no clock")

    monkeypatch.setattr(Phases, "_now", fail)
    made = patched(tmp_path, Sampling)
    made.train()
    assert capsys.readouterr().err.count("training statistics end here, since they failed: RuntimeError: no clock") == 1
    assert len(logged(made)) == 4

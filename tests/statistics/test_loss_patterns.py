"""Patterns in losses: each is named once, when it is there, and healthy runs hear nothing."""

import math
import random

import pytest

from sloth_plugins.statistics.history import History
from sloth_plugins.statistics.patterns import seen_in


def log(losses, evals=None, max_steps=None, rate=2e-4, **more):
    """A log with a loss every tenth step, and an eval loss after as many of them as there are evals to spread."""
    entries, evals = [], list(evals or [])
    every = len(losses) // len(evals) if evals else 0
    for i, loss in enumerate(losses, 1):
        entries.append({"step": 10 * i, "loss": loss, "learning_rate": rate, **more})
        if every and i % every == 0 and evals:
            entries.append({"step": 10 * i, "eval_loss": evals.pop(0)})
    return History(entries, 10 * len(losses) if max_steps is None else max_steps)


def falling(count, noise, seed=0, start=2.0, end=0.8):
    rng = random.Random(seed)
    levels = [end + (start - end) * math.exp(-4 * i / count) for i in range(count)]
    return [level * (1 + rng.gauss(0, noise)) for level in levels]


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.15])
@pytest.mark.parametrize("count", [5, 20, 60, 300])
def test_a_healthy_run_hears_nothing(noise, count):
    for seed in range(10):
        evals = falling(10, 0.0, seed, 2.0, 1.1)
        assert seen_in(log(falling(count, noise, seed), evals if count >= 20 else None)) == []


def test_a_plateau_at_the_end_is_no_pattern():
    assert seen_in(log(falling(40, 0.05) + [0.8] * 60)) == []


def test_overfitting():
    evals = [1.5, 1.2, 1.1, 1.15, 1.2, 1.3, 1.4]
    (line,) = seen_in(log(falling(70, 0.05), evals))
    assert line.startswith("step 500: the eval loss rises (1.100 at step 300, now 1.200)")
    assert "EarlyStoppingCallback" in line


def test_overfitting_of_one_of_several_data_sets():
    entries = []
    for i, loss in enumerate(falling(70, 0.0)):
        entries.append({"step": i, "loss": loss})
        if i % 10 == 9:
            entries.append({"step": i, "eval_far_loss": [1.5, 1.2, 1.1, 1.15, 1.2, 1.3, 1.4][i // 10]})
            entries.append({"step": i, "eval_near_loss": 1.0 - i / 100})
    (line,) = seen_in(History(entries, 70))
    assert line.startswith("step 49: the eval far loss rises (1.100 at step 29, now 1.200)")


def test_an_eval_loss_that_trembles_is_no_overfitting():
    assert seen_in(log(falling(70, 0.05), [1.5, 1.2, 1.1, 1.105, 1.101, 1.107, 1.103])) == []


def test_an_eval_loss_that_rises_with_the_training_loss_is_no_overfitting():
    losses = [*falling(30, 0.0), *(0.9 + 0.01 * i for i in range(40))]
    assert not any("overfitting" in line for line in seen_in(log(losses, [1.5, 1.2, 1.1, 1.15, 1.2, 1.3, 1.4])))


def test_swinging():
    rng = random.Random(1)
    losses = [*falling(20, 0.05, end=1.5), *(1.6 + 0.9 * math.sin(2 * i) + rng.gauss(0, 0.1) for i in range(40))]
    (line,) = seen_in(log(losses, rate=5e-3))
    assert "swings by" in line
    assert "lower learning rate (it is 0.005)" in line


@pytest.mark.parametrize("before", [0, 30])
def test_a_loss_that_blows_up_gets_no_advice_to_raise_the_rate(before):
    losses = [*falling(before, 0.05), *(min(2.0 * 1.2**i, 9.0) for i in range(40))]
    (line,) = seen_in(log(losses, rate=0.5))
    assert "the training loss rises, from 2." in line or "swings" in line
    assert "lower learning rate (it is 0.5)" in line


def test_not_falling():
    rng = random.Random(1)
    (line,) = seen_in(log([2.0 * (1 + rng.gauss(0, 0.02)) for _ in range(60)], rate=1e-8))
    assert "has not fallen, from 2." in line
    assert "labels" in line


def test_not_falling_is_said_after_a_part_of_the_run_only():
    losses = [2.0] * 40
    assert seen_in(log(losses, max_steps=10_000)) == []
    assert len(seen_in(log(losses, max_steps=1_000))) == 1


def test_reinforcement_learning_has_another_loss():
    assert seen_in(log([0.0] * 60, reward=0.3)) == []
    rng = random.Random(2)
    assert seen_in(log([rng.gauss(0, 0.1) for _ in range(60)], reward=0.3)) == []


def test_numbers_that_are_none_are_passed_over():
    losses = falling(60, 0.02)
    losses[20:30] = [math.nan] * 10
    assert seen_in(log(losses, [1.5, math.nan, 1.2])) == []

"""Budgets, the knapsack against every subset, and what is listed."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sloth_plugins.errors import SlothError
from sloth_plugins.quantization.selection import STEPS, Choice, budget_bytes, choose, grouped, skip_list

ITEMS = st.lists(st.tuples(st.floats(0, 10), st.integers(1, 1000)), max_size=9)


def choices(items):
    return [Choice(names=(str(index),), score=score, extra=extra) for index, (score, extra) in enumerate(items)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10%", 100), ("+10%", 100), ("2.5 %", 25), ("600MiB", 600 * 2**20), ("+1GB", 10**9), ("512", 512), ("0%", 0)],
)
def test_budgets(text, expected):
    assert budget_bytes(text, 1000) == expected


@pytest.mark.parametrize("text", ["", "ten", "-5%", "10 percent", "10%%", "MiB", "1e3", "nan"])
def test_a_budget_that_is_none_is_one_line(text):
    with pytest.raises(SlothError, match="is not understood; it is a share"):
        budget_bytes(text, 1000)


@settings(max_examples=100, deadline=None)
@given(ITEMS, st.integers(0, 3000))
def test_the_knapsack_is_as_good_as_the_best_subset(items, budget):
    known = choices(items)
    found = choose(known, budget)
    subsets = (subset for count in range(len(known) + 1) for subset in combinations(known, count))
    best = max(sum(c.score for c in subset) for subset in subsets if sum(c.extra for c in subset) <= budget)
    assert sum(choice.extra for choice in found) <= budget
    assert len(set(found)) == len(found)
    assert sum(choice.score for choice in found) == pytest.approx(best)


def test_a_budget_beyond_its_steps_is_never_passed_and_hardly_wasted():
    known = choices([(1 + index % 7, 10**6 + 7919 * index) for index in range(200)])
    budget = 50 * 10**6 + 13
    assert budget > STEPS
    found = choose(known, budget)
    spent = sum(choice.extra for choice in found)
    assert 0.97 * budget < spent <= budget


def test_projections_of_one_input_stay_together():
    names = [f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]
    names += ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
    assert grouped(names) == {
        "model.layers.0.self_attn.qkv_proj": tuple(names[:3]),
        "model.layers.0.mlp.gate_up_proj": tuple(names[3:5]),
        "model.layers.0.mlp.down_proj": (names[5],),
    }


def test_the_list_has_whole_paths_the_head_and_joint_names():
    names = ["a.q_proj", "a.k_proj", "a.v_proj", "b.gate_proj", "b.up_proj", "b.down_proj"]
    found = skip_list(["a.q_proj", "a.k_proj", "a.v_proj", "b.up_proj"], names, ["lm_head", "tower.fc"])
    assert found == ["a.k_proj", "a.q_proj", "a.qkv_proj", "a.v_proj", "b.up_proj", "lm_head", "tower.fc"]

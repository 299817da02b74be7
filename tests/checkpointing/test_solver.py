"""The solver against every plan there is."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sloth_plugins.patches.blocks.policy import Policy
from sloth_plugins.patches.checkpointing.options import Option, peak, stretch
from sloth_plugins.patches.checkpointing.plan import share_of
from sloth_plugins.patches.checkpointing.solver import STEPS, solve, tightest


def ways(keep, attention, part, work, seconds, host=True):
    """What a layer may do, as bytes and seconds grow."""
    made = [
        Option(Policy.KEEP, False, keep, 0, work // 2, 0.0),
        Option(Policy.ATTENTION, False, attention, 0, work, seconds * 0.8),
        Option(Policy.INPUT, False, part, 0, work, seconds),
    ]
    if host:
        made.append(Option(Policy.INPUT, True, 0, part, work, seconds * 1.1))
    return made


LAYER = st.builds(
    ways,
    keep=st.integers(50, 90),
    attention=st.integers(20, 40),
    part=st.integers(1, 10),
    work=st.integers(0, 40),
    seconds=st.sampled_from([1.0, 1.5, 3.0]),
    host=st.booleans(),
)


def brute_force(layers, budget, after, births=()):
    """The least seconds of any plan that fits, without the host."""
    choices = [[option for option in options if not option.on_host] for options in layers]
    fitting = [plan for plan in itertools.product(*choices) if peak(plan, after, births) <= budget]
    return min((sum(option.seconds for option in plan) for plan in fitting), default=None)


@settings(deadline=None, max_examples=150)
@given(st.lists(LAYER, min_size=1, max_size=5), st.integers(0, 600), st.integers(0, 60))
def test_no_plan_that_fits_is_faster(layers, budget, after):
    """Small numbers of bytes are steps of their own, so the table is exact."""
    assert budget <= STEPS
    plan, best = solve(layers, budget, after), brute_force(layers, budget, after)
    if plan is None:
        assert best is None
        return
    assert peak(plan, after) <= budget
    assert all(option in options for option, options in zip(plan, layers, strict=True))
    found = sum(option.seconds for option in plan)
    # Among layers that differ, the table does not know which of two orders has the lower peak.
    slack = max(option.seconds for options in layers for option in options)
    assert found <= best + slack
    if len({tuple(options) for options in layers}) == 1:
        assert abs(found - best) < 1e-9


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 5), LAYER, st.integers(0, 800), st.integers(0, 60), st.integers(0, 90))
def test_no_plan_of_like_layers_that_bear_gradients_is_faster(count, options, budget, after, born):
    layers, births = [options] * count, [born] * count
    plan, best = solve(layers, budget, after, births=births), brute_force(layers, budget, after, births)
    assert (plan is None) is (best is None)
    if plan is not None:
        assert peak(plan, after, births) <= budget
        assert abs(sum(option.seconds for option in plan) - best) < 1e-9


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 40), LAYER, st.floats(0.0, 1.0))
def test_of_like_layers_the_later_keep_more(count, options, share):
    layers = [options] * count
    full = peak([options[0]] * count, 30)
    plan = solve(layers, int(full * share), 30)
    if plan is not None:
        assert [option.kept for option in plan] == sorted(option.kept for option in plan)


def test_all_is_kept_where_it_fits_and_nothing_more():
    layers = [ways(100, 30, 10, 50, 1.0)] * 4
    everything = [options[0] for options in layers]
    assert solve(layers, peak(everything, 20), 20) == everything
    less = solve(layers, peak(everything, 20) - 1, 20)
    assert sum(option.policy is not Policy.KEEP for option in less) == 1
    assert less[0].policy is not Policy.KEEP


def test_large_budgets_are_met_within_a_step_for_each_layer():
    unit = 10**9
    layers = [ways(100 * unit, 30 * unit, 10 * unit, 50 * unit, 1.0)] * 32
    budget = 1700 * unit
    plan = solve(layers, budget, 20 * unit)
    assert budget - 100 * unit < peak(plan, 20 * unit) <= budget


def test_the_host_takes_what_it_can_but_never_the_last_layer():
    layers = [ways(100, 30, 10, 0, 1.0)] * 4
    assert [option.on_host for option in solve(layers, 10, 0, host_budget=10**6)] == [True, True, True, False]
    assert solve(layers, 29, 0, host_budget=10) is None
    assert [option.on_host for option in solve(layers, 30, 0, host_budget=10)] == [True, False, False, False]
    assert solve(layers, 30, 0) is None
    assert [option.on_host for option in tightest(layers, 20)] == [True, True, False, False]


def test_nothing_fits_below_what_the_rest_takes():
    layers = [ways(100, 30, 10, 50, 1.0)] * 2
    assert solve(layers, 20, 30) is None
    assert solve(layers, 35, 30) is None
    assert solve(layers, 70, 30) is not None


def test_a_share_counts_what_is_computed_again_and_no_copies():
    layers = [ways(50, 20, 5, 10, seconds) for seconds in (1.0, 3.0)]
    keep, attention, part, on_host = range(4)
    shares = {
        (keep, keep): 0.0,
        (part, part): 1.0,
        (on_host, on_host): 1.0,
        (part, keep): 0.25,
        (keep, on_host): 0.75,
        (attention, attention): 0.8,
    }
    for chosen, share in shares.items():
        plan = [options[i] for options, i in zip(layers, chosen, strict=True)]
        assert abs(share_of(plan, layers) - share) < 1e-12


def test_gradients_come_while_what_was_kept_goes():
    plan = [ways(100, 30, 10, 50, 1.0)[0]] * 4
    # Kept by all and the last layer's work and gradients, or one layer's with those of all four.
    assert peak(plan, 0) == 400 + 25
    assert peak(plan, 0, [5] * 4) == 400 + 25 + 5
    assert peak(plan, 0, [110] * 4) == 100 + 25 + 440
    assert peak(plan, 200, [5] * 4) == 600


CHOSEN = st.lists(st.tuples(LAYER, st.integers(0, 3)), min_size=1, max_size=6)


@given(CHOSEN, st.sampled_from([0, 7, 120]), st.floats(0.5, 2.0))
def test_work_is_known_from_the_worst_moment_of_all_backwards(layers, born, factor):
    """Whichever layer had it: those whose input waits on the host hold less and need more."""
    plan = [options[index % len(options)] for options, index in layers]
    plan = [replace(option, fetched=2 * option.host) for option in plan]
    births = [born] * len(layers)
    real = [replace(option, work=factor * max(1, option.work)) for option in plan]
    most = peak(real, 0, births) - sum(option.kept for option in plan)
    found = stretch(most, [replace(option, work=max(1, option.work)) for option in plan], births)
    again = [replace(option, work=found * max(1, option.work)) for option in plan]
    assert peak(again, 0, births) == pytest.approx(peak(real, 0, births))

"""Two patches of ours, or of a plugin, for one target: each model runs what its report says."""

import dataclasses
import functools
import types

import pytest
from models import KNOWN, assert_close, build, gradients

import sloth_plugins
from sloth_plugins import discovery
from sloth_plugins.application import patched
from sloth_plugins.errors import SlothError
from sloth_plugins.patching import examine
from sloth_plugins.registry import hookimpl
from sloth_plugins.scoped import original_of, scoped_function
from sloth_plugins.selection import parse

CALLS = []


def counting(original):
    @functools.wraps(original)
    def replacement(*args, **kwargs):
        CALLS.append(original)
        return original(*args, **kwargs)

    return replacement


@pytest.fixture
def rivals(architecture, monkeypatch):
    """Plugins with a second patch for each target, off by default, and the pairs of names."""
    name, _ = architecture
    meant = [patch for patch in KNOWN.patches(name) if patch.default]
    pairs = [(patch.name, f"{patch.name}_too") for patch in meant]
    doubles = [
        dataclasses.replace(
            patch, name=f"{patch.name}_too", replacement=f"{__name__}:counting", layout=None, default=False
        )
        for patch in meant
    ]
    module = types.ModuleType("doubles")
    module.sloth_patches = hookimpl(
        function=lambda architecture: doubles if architecture.name == name else [], specname="sloth_patches"
    )
    entry = types.SimpleNamespace(name="doubles", value="doubles", load=lambda: module)
    monkeypatch.setattr(discovery, "entry_points", lambda group: [entry])
    CALLS.clear()
    return discovery.Plugins(), name, pairs


def test_two_models_run_different_replacements_of_one_target(architecture, rivals):
    plugins, name, pairs = rivals
    for first, second in pairs:
        one, other, stock = (build(*architecture) for _ in range(3))
        examine(one, parse(f"{name}:{first}"), known=plugins)
        (report,) = [o for o in examine(other, parse(f"{name}:{second}"), known=plugins).outcomes if o.patch == second]
        assert report.state == "applied"
        expected = gradients(stock)
        CALLS.clear()
        assert_close(gradients(one), expected)
        assert CALLS == []
        assert_close(gradients(other), expected)
        assert len(CALLS) == report.modules
        sloth_plugins.revert(one)
        CALLS.clear()
        assert_close(gradients(other), expected)
        assert len(CALLS) == report.modules
        sloth_plugins.revert(other)


def test_two_patches_of_one_target_in_one_model_are_refused_by_name(architecture, rivals):
    plugins, name, pairs = rivals
    for first, second in pairs:
        model = build(*architecture)
        with pytest.raises(SlothError, match=f"patch '{first}' already replaces"):
            examine(model, parse(f"{name}:{first}+{second}"), known=plugins)
        report = examine(model, parse(f"{name},{name}:*_too"), known=plugins)
        states = {outcome.patch: outcome.state for outcome in report.outcomes}
        assert (states[first], states[second]) == ("applied", "skipped")
        sloth_plugins.revert(model)


def test_a_function_that_had_another_original_in_between_is_known_again(architecture, monkeypatch):
    """What somebody sets for a while, and we are told to patch all the same, leaves nothing behind."""
    model = build(*architecture)
    sloth_plugins.patch(model)
    holders = [b.scoped for m in model.modules() if (state := patched(m)) for b in state.bindings if b.scoped]
    if not holders:
        pytest.skip("no function of a module is patched here")
    scoped = holders[0]
    assert original_of(getattr(scoped.owner, scoped.name)) is scoped.original
    other = scoped_function(scoped.owner, scoped.name, lambda q, k: (q, k))
    assert other is not scoped
    assert original_of(scoped.dispatcher) is scoped.original
    assert scoped_function(scoped.owner, scoped.name, scoped.original) is scoped
    sloth_plugins.revert(model)
    assert getattr(scoped.owner, scoped.name) is scoped.original

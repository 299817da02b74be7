"""Fingerprints: equal for one program in any spelling, different for another, and what the runtime does with them."""

import dataclasses
import functools
import importlib.util
import textwrap

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import sloth_plugins
from sloth_plugins import discovery
from sloth_plugins.compatibility import known_fingerprints
from sloth_plugins.errors import SlothError
from sloth_plugins.fingerprint import fingerprint, normalised
from sloth_plugins.patches.conventions import TINY
from sloth_plugins.registry import ArchitectureSpec, SpecError

SOURCE = """
def helper(x):
    return x + 1


def unused(x):
    return x - 1


class Norm:
    def _inner(self, x):
        return helper(x)

    def forward(self, x, scale=2.0):
        y: float = self._inner(x)
        return y * scale
"""


@pytest.fixture
def load(tmp_path):
    count = iter(range(100))

    def loaded(source):
        file = tmp_path / f"upstream{next(count)}.py"
        file.write_text(textwrap.dedent(source))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return loaded


def of(module, deep=True):
    return fingerprint(module.Norm.forward, module.Norm, deep=deep)


SAME = {
    "layout": ("y * scale", "(y\n                * scale)"),
    "a comment": ("return y * scale", "return y * scale  # scaled"),
    "a docstring": ("y: float =", '"""Norm."""\n        y: float ='),
    "annotations": ("def forward(self, x, scale=2.0):", "def forward(self, x: int, scale: float = 2.0) -> int:"),
    "an annotated assignment": ("y: float =", "y ="),
    "code that is not called": ("x - 1", "x - 2"),
}
OTHER = {
    "another operation": ("y * scale", "y / scale"),
    "another order": ("y * scale", "scale * y"),
    "another default": ("scale=2.0", "scale=3.0"),
    "another name": ("scale", "factor"),
    "a method that it calls": ("return helper(x)", "return 2 * helper(x)"),
    "a function that its method calls": ("x + 1", "x + 2"),
    "a decorator": ("    def forward", "    @staticmethod\n    def forward"),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_one_program_in_two_spellings(load, change):
    assert change[0] in SOURCE
    changed = load(SOURCE.replace(*change))
    assert of(changed) == of(load(SOURCE)) is not None
    assert len(of(changed)) == 16


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_another_program(load, change):
    changed = load(SOURCE.replace(*change))
    if change[1].startswith("    @"):
        changed.Norm.forward = vars(changed.Norm)["forward"]
    assert of(changed) != of(load(SOURCE))


def test_what_it_calls_counts_only_where_asked(load):
    changed = load(SOURCE.replace("x + 1", "x + 2"))
    assert of(changed, deep=False) == of(load(SOURCE), deep=False)
    text = normalised(changed.Norm.forward, changed.Norm)
    assert "return x + 2" in text
    assert "unused" not in text


def test_code_without_a_source_has_none(load):
    namespace = {}
    exec("def forward(self, x): return x", namespace)
    assert fingerprint(namespace["forward"]) is None
    assert normalised(namespace["forward"]) is None
    assert fingerprint(len) is None


def test_a_decorator_that_keeps_the_function_is_seen_through(load):
    module = load(SOURCE)

    @functools.wraps(module.helper)
    def wrapped(*args):
        return module.helper(*args)

    assert fingerprint(wrapped) == fingerprint(module.helper)


def test_a_helper_that_somebody_wraps_is_not_what_was_tested(load, monkeypatch):
    module = load(SOURCE)
    real, before = module.helper, of(module)

    @functools.wraps(real)
    def tripled(x):
        return 3 * real(x)

    monkeypatch.setattr(module, "helper", tripled)
    assert of(module) is None
    monkeypatch.setattr(module, "helper", real)
    assert of(module) == before


def test_a_method_that_is_replaced_later_is_seen(load, monkeypatch):
    module = load(SOURCE)
    before = of(module)
    other = load(SOURCE.replace("return helper(x)", "return 2 * helper(x)"))
    other.Norm._inner.__module__ = module.__name__
    monkeypatch.setattr(module.Norm, "_inner", other.Norm._inner)
    assert of(module) != before


def test_every_patch_of_ours_is_known_on_the_installed_transformers():
    known = discovery.Plugins(load_entry_points=False)
    patches = [patch for name in known.architectures for patch in known.patches(name)]
    assert len(patches) > 30
    from sloth_plugins.registry import Skip
    from sloth_plugins.resolving import bind, target_path

    for patch in patches:
        assert known_fingerprints(target_path(patch))
        bound = bind(patch)
        assert not isinstance(bound, Skip), bound
        assert bound.drift is None


@pytest.fixture
def drifted(monkeypatch, tmp_path):
    """Upstream's Llama norm, with the same result from other code."""
    file = tmp_path / "drifted.py"
    file.write_text(
        "def forward(self, hidden_states):\n"
        "    wide = hidden_states.to(torch.float32)\n"
        "    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)\n"
        "    return self.weight * wide.to(hidden_states.dtype)\n"
    )
    namespace = dict(vars(modeling_llama))
    exec(compile(file.read_text(), str(file), "exec"), namespace)
    forward = namespace["forward"]
    forward.__module__ = modeling_llama.__name__
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    return forward


def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY))


def test_unknown_code_is_left_alone_with_one_line(drifted):
    report = sloth_plugins.patch(llama(), "1")
    norm, *others = report.outcomes
    assert norm.state == "skipped"
    assert "LlamaRMSNorm is not as tested" in norm.reason
    assert "SLOTH_PLUGINS=1,llama:rms_norm applies it all the same" in norm.reason
    assert "\n" not in norm.reason
    assert {outcome.state for outcome in others} == {"applied"}


def test_a_family_that_is_named_is_no_patch_that_is_named(drifted):
    assert sloth_plugins.patch(llama(), "llama").outcomes[0].state == "skipped"


def test_unknown_code_is_patched_where_the_user_names_it_with_a_warning(drifted):
    report = sloth_plugins.patch(llama(), "1,llama:rms_norm")
    norm = report.outcomes[0]
    assert (norm.state, norm.modules) == ("applied", 5)
    assert norm.reason.startswith("untested: LlamaRMSNorm is not as tested")
    assert "sloth-plugins verify" in norm.reason


def test_code_whose_signature_does_not_fit_is_not_patched_even_then(monkeypatch, drifted):
    def forward(self, hidden_states, residual=None):
        return hidden_states

    forward.__globals__["__name__"], mine = modeling_llama.__name__, forward.__globals__["__name__"]
    try:
        monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
        with pytest.raises(SlothError, match="does not fit the signature"):
            sloth_plugins.patch(llama(), "llama:rms_norm")
    finally:
        forward.__globals__["__name__"] = mine


def test_a_plugin_may_pin_the_code_that_it_is_written_for(monkeypatch, drifted):
    known = discovery.Plugins(load_entry_points=False)
    spec = known.architectures["llama"]
    found = fingerprint(drifted, modeling_llama.LlamaRMSNorm)

    def with_pins(*pins):
        patches = [dataclasses.replace(spec.patches[0], fingerprints=pins), *spec.patches[1:]]
        known._patches["llama"] = tuple(patches)
        monkeypatch.setattr("sloth_plugins.patching.plugins", lambda: known)
        return sloth_plugins.patch(llama(), "1").outcomes[0].state

    assert with_pins(found) == "applied"
    assert with_pins("0" * 16) == "skipped"


def test_a_fingerprint_that_is_none_is_refused():
    patch = discovery.Plugins(load_entry_points=False).architectures["llama"].patches[0]
    with pytest.raises(SpecError, match="'abc' is not 16 hexadecimal digits"):
        dataclasses.replace(patch, fingerprints=("abc",))
    with pytest.raises(SpecError, match="'nowhere' is not"):
        dataclasses.replace(patch, formerly=("nowhere",))
    with pytest.raises(SpecError, match="family='A b'"):
        ArchitectureSpec(name="mine", family="A b", model_types=("mine",), patches=())

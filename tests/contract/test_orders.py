"""Patch, revert, copy, save, pickle and train in every order: the model stays what it is."""

import copy
import io
import itertools
import pickle
import random

import pytest
import torch
from models import KNOWN, anatomy, assert_close, build, gradients

import sloth_plugins
from sloth_plugins.application import patched


class Bench:
    """One model, what is expected of it now, and the operations under test."""

    def __init__(self, architecture, folder):
        self.architecture, self.folder = architecture, folder
        self.model = build(*architecture)
        self.keys = list(self.model.state_dict())
        self.stock_types = {name: type(module) for name, module in self.model.named_modules()}
        self.expected = gradients(build(*architecture))
        self.is_patched = False

    def patch(self):
        sloth_plugins.patch(self.model, "1")
        self.is_patched = True

    def one_patch(self):
        name, _ = self.architecture
        sloth_plugins.patch(self.model, f"{name}:{KNOWN.patches(name)[0].name}")
        self.is_patched = True

    def revert(self):
        sloth_plugins.revert(self.model)
        self.is_patched = False

    def deepcopy(self):
        self.model = copy.deepcopy(self.model)

    def state_dict(self):
        other = build(*self.architecture, seed=9)
        other.load_state_dict(self.model.state_dict())
        self.model.load_state_dict(other.state_dict())

    def save_and_load(self):
        self.model.save_pretrained(self.folder)
        self.model = type(self.model).from_pretrained(self.folder)
        self.is_patched = False

    def pickle(self):
        self.model = pickle.loads(pickle.dumps(self.model))
        self.is_patched = False

    def torch_save(self):
        buffer = io.BytesIO()
        torch.save(self.model, buffer)
        buffer.seek(0)
        self.model = torch.load(buffer, weights_only=False)
        self.is_patched = False

    def train(self):
        before = [parameter.detach().clone() for parameter in self.model.parameters()]
        gradients(self.model)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        optimizer.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, self.model.parameters(), strict=True))
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), before, strict=True):
                parameter.copy_(value)

    def check(self):
        assert any(patched(module) for module in self.model.modules()) is self.is_patched
        assert list(self.model.state_dict()) == self.keys
        for name, module in self.model.named_modules():
            stock = self.stock_types[name]
            assert isinstance(module, stock)
            assert (type(module).__name__, type(module).__module__) == (stock.__name__, stock.__module__)
            assert self.is_patched or type(module) is stock
        assert_close(gradients(self.model), self.expected)


OPERATIONS = (
    *("patch", "one_patch", "revert", "deepcopy", "state_dict"),
    *("save_and_load", "pickle", "torch_save", "train"),
)


# Orders are the runtime's business and not a family's: so many of those of three operations, each beginning, on a model
# of each kind of binding (classes and a function; norms deferred into the function), of those of two on all others.
THOROUGHLY = ("llama", "qwen3")
SHARE, LEAST = 9, 1


@pytest.mark.parametrize("first", OPERATIONS)
def test_every_order_of_operations_after_a_patch(architecture, first, tmp_path):
    more, share = (2, SHARE) if architecture[1] in THOROUGHLY else (1, LEAST)
    orders = list(itertools.product(OPERATIONS, repeat=more))
    for rest in random.Random(f"{architecture} {first}").sample(orders, share):
        bench = Bench(architecture, tmp_path)
        for operation in ("patch", first, *rest):
            getattr(bench, operation)()
        bench.check()
        bench.revert()
        bench.check()


@pytest.mark.parametrize("seed", range(3))
def test_long_orders(architecture, seed, tmp_path):
    if seed > 0 and architecture[1] not in THOROUGHLY:
        pytest.skip("one long order of each family is enough")
    bench = Bench(architecture, tmp_path)
    for operation in random.Random(seed).choices(OPERATIONS, k=25):
        getattr(bench, operation)()
        bench.check()


def test_revert_restores_every_object(architecture):
    model = build(*architecture)
    before = anatomy(model)
    for selection in ("1", "1", "-*:rms_norm", "*:rope", "1"):
        sloth_plugins.patch(model, selection)
        gradients(model)
        model.zero_grad()
    assert sloth_plugins.revert(model) > 0
    model.zero_grad(set_to_none=True)
    assert anatomy(model) == before
    assert sloth_plugins.revert(model) == 0


def test_patching_twice_changes_nothing(architecture):
    model = build(*architecture)
    first = sloth_plugins.patch(model, "1")
    classes = [type(module) for module in model.modules()]
    second = sloth_plugins.patch(model, "1")
    assert first.changed > 0
    assert second.changed == 0
    assert [type(module) for module in model.modules()] == classes
    assert [o.modules for o in first.outcomes] == [o.modules for o in second.outcomes]


def test_two_models_of_which_one_is_patched(architecture):
    model, other = build(*architecture), build(*architecture)
    untouched = anatomy(other)
    sloth_plugins.patch(model, "1")
    for name, module in other.named_modules():
        assert patched(module) is None, name
    functions = {key for key in untouched if isinstance(key, tuple) and key[-1] == "functions"}
    now = anatomy(other)
    assert {k: v for k, v in now.items() if k not in functions} == {
        k: v for k, v in untouched.items() if k not in functions
    }
    assert_close(gradients(model), gradients(other))
    sloth_plugins.revert(model)
    assert anatomy(other) == untouched


def test_a_deep_copy_stays_patched_when_the_first_is_reverted(architecture):
    model = build(*architecture)
    report = sloth_plugins.patch(model, "1")
    duplicate = copy.deepcopy(model)
    sloth_plugins.revert(model)
    assert sum(patched(module) is not None for module in duplicate.modules()) == report.changed
    assert_close(gradients(duplicate), gradients(model))
    assert sloth_plugins.revert(duplicate) == report.changed


def test_an_interrupt_in_the_middle_of_patching_leaves_the_model_stock(architecture, monkeypatch):
    from sloth_plugins import application

    model = build(*architecture)
    before = anatomy(model)
    real, calls = application._swap, []

    def interrupted(module, kind, bound):
        calls.append(kind)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(module, kind, bound)

    monkeypatch.setattr(application, "_swap", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sloth_plugins.patch(model, "1")
    assert len(calls) > 4
    assert anatomy(model) == before


def test_an_interrupt_between_two_halves_of_one_change_is_undone_too(architecture, monkeypatch):
    from accelerate.hooks import attach_execution_device_hook

    from sloth_plugins import application

    model, stock = build(*architecture), build(*architecture)
    attach_execution_device_hook(model, torch.device("cpu"))
    held = {name: vars(module).get("_old_forward") for name, module in model.named_modules()}
    calls = []

    def interrupted(module):
        calls.append(module)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(application, "_hold", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sloth_plugins.patch(model, "1")
    assert not any(patched(module) for module in model.modules())
    assert {name: vars(module).get("_old_forward") for name, module in model.named_modules()} == held
    assert_close(gradients(model), gradients(stock))


def test_another_of_a_patched_models_class_is_stock(architecture, tmp_path):
    model = build(*architecture)
    stock = type(model)
    sloth_plugins.patch(model)
    for another in (type(model)(model.config), type(model)._from_config(model.config)):
        assert type(another) is stock
        assert not any(map(patched, another.modules()))

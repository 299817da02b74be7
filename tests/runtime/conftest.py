"""Trainers of a toy upstream, and a plugin with patches of them."""

import types

import pytest
from toy_patches import CALLS, model, patch
from toy_trainers import ToyTrainer
from transformers import TrainingArguments

from sloth_plugins import discovery
from sloth_plugins.registry import TrainerSpec, hookimpl


@pytest.fixture(autouse=True)
def _forget():
    CALLS.clear()
    yield
    discovery.plugins.cache_clear()


@pytest.fixture
def declare(monkeypatch):
    """A third-party plugin with these patches of trainers, and with further hooks."""

    def declared(*patches, requires=(), **hooks):
        module = types.ModuleType("toy_plugin")
        spec = TrainerSpec(name="toy_all", family="toy", patches=patches or (patch(),), requires=requires)
        for name, function in {"sloth_trainers": lambda: [spec], **hooks}.items():
            setattr(module, name, hookimpl(function))
        entry = types.SimpleNamespace(name="toy", value="toy", load=lambda: module)
        monkeypatch.setattr(discovery, "entry_points", lambda group: [entry])
        # Without what is meant for every trainer, so that a trainer is stock where the toy's patches are not for it.
        builtin = tuple(name for name in discovery.BUILTIN if name != "trainer")
        monkeypatch.setattr(discovery.Plugins.__init__, "__defaults__", (builtin,))
        discovery.plugins.cache_clear()

    return declared


@pytest.fixture
def make(tmp_path):
    def made(kind=ToyTrainer, network=None):
        args = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, max_steps=1, report_to=[], disable_tqdm=True, save_strategy="no"
        )
        rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8
        network = model() if network is None else network
        return kind(model=network, args=args, train_dataset=rows, eval_dataset=rows)

    return made

"""Trainer without walks through the model at every step: what it then knows and does is what it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import sloth_plugins
from sloth_plugins.patches.trainers.bookkeeping import parameters, tree_of

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


def trainer(folder, steps=3):
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), LoraConfig(r=2, target_modules="all-linear"))
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))} for _ in range(8)]
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=steps, report_to=[], save_strategy="no", disable_tqdm=True
    )
    return Trainer(model=model, args=args, train_dataset=rows)


def patched(folder):
    made = trainer(folder)
    report = sloth_plugins.patch(made.model, "trainer:bookkeeping", trainer=made)
    assert [o.state for o in report.outcomes if o.patch == "bookkeeping"] == ["applied"]
    return made


@pytest.fixture
def walks(monkeypatch):
    """Calls of the model's own `train` and `num_parameters`."""
    seen = []
    for name in ("train", "num_parameters"):
        original = getattr(LlamaForCausalLM, name)

        def counting(self, *args, name=name, original=original, **kwargs):
            seen.append(name)
            return original(self, *args, **kwargs)

        counting.__module__ = original.__module__
        monkeypatch.setattr(LlamaForCausalLM, name, counting)
    return seen


def test_the_count_is_upstreams_and_made_once(tmp_path, walks):
    stock = trainer(tmp_path)
    stock.train()
    counted = walks.count("num_parameters")
    del walks[:]
    ours = patched(tmp_path)
    ours.train()
    assert ours.state.total_flos == stock.state.total_flos > 0
    assert walks.count("num_parameters") == counted - 2
    assert "num_parameters" not in vars(ours.model.get_base_model())


def test_the_mode_is_set_only_where_it_is_another(tmp_path, walks):
    ours = patched(tmp_path)
    ours.train()
    in_loop = walks.count("train")
    stock = trainer(tmp_path)
    del walks[:]
    stock.train()
    assert in_loop == walks.count("train") - 3
    assert "train" not in vars(ours.model)


def test_a_module_that_came_in_another_mode_is_brought_back_with_the_next_step(tmp_path):
    ours = patched(tmp_path)
    ours.args.max_grad_norm = 0.0  # nobody asks for the parameters
    layer = ours.model.get_base_model().model.layers[0]
    modes = []

    class Swapping(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                layer.came = torch.nn.Dropout().eval()

        def on_step_begin(self, args, state, control, **kwargs):
            modes.append(getattr(layer, "came", layer).training)

    ours.add_callback(Swapping())
    ours.train()
    assert modes == [True, False, False]
    assert layer.came.training


def test_a_module_in_another_mode_is_brought_back(tmp_path):
    ours = patched(tmp_path)
    norm = ours.model.get_base_model().model.norm
    modes = []

    def step(self, *args, **kwargs):
        norm.eval()
        result = type(self).training_step(self, *args, **kwargs)
        modes.append(norm.training)
        return result

    ours.training_step = step.__get__(ours)
    ours.train()
    assert modes == [True] * 3


def test_a_step_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    ours = patched(tmp_path)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ours, "compute_loss", fail)
    with pytest.raises(KeyboardInterrupt):
        ours.train()
    assert "train" not in vars(ours.model)


def test_parameters_come_in_torchs_order(tmp_path):
    model = trainer(tmp_path).model
    shared = torch.nn.Linear(2, 2)
    model.extra = torch.nn.ModuleList(
        [shared, torch.nn.ModuleDict({"again": shared}), torch.nn.Linear(2, 2, bias=False)]
    )
    model.extra[2].weight = shared.weight
    model.none = None
    assert tree_of(model) is not None
    found, expected = list(parameters(model)), list(model.parameters())
    assert len(found) == len(expected)
    assert all(a is b for a, b in zip(found, expected, strict=True))
    assert list(parameters(shared, recurse=False)) == list(shared.parameters(recurse=False))


def test_a_class_with_names_of_its_own_is_asked(tmp_path):
    class Own(torch.nn.Linear):
        def named_parameters(self, *args, **kwargs):
            yield "weight", self.weight

    model = Own(2, 2)
    assert tree_of(model) is not None
    assert len(list(parameters(model))) == 1


def test_a_change_below_a_model_is_seen(tmp_path):
    model = trainer(tmp_path).model
    before = tree_of(model)
    assert tree_of(model) is before
    inner = model.get_base_model().model
    changes = [
        lambda: setattr(inner, "extra", torch.nn.Linear(2, 2)),
        lambda: inner.extra.register_parameter("bias", None),
        lambda: setattr(inner.extra, "weight", torch.nn.Parameter(torch.ones(2, 2))),
        lambda: setattr(inner.extra, "__class__", type("Own", (torch.nn.Linear,), {})),
        lambda: delattr(inner, "extra"),
    ]
    for change in changes:
        known = tree_of(model)
        change()
        assert tree_of(model) is not known
        assert [id(p) for p in parameters(model)] == [id(p) for p in torch.nn.Module.parameters(model)]


def test_modules_with_children_elsewhere_are_walked_through():
    model = torch.nn.Sequential(torch.jit.script(torch.nn.Linear(2, 2)))
    assert tree_of(model) is None
    assert len(list(parameters(model))) == 2


def test_torchs_own_is_back_after_training(tmp_path):
    before = torch.nn.Module.parameters
    seen = []
    ours = patched(tmp_path)

    def fail(*args, **kwargs):
        seen.append(torch.nn.Module.parameters is parameters)
        raise KeyboardInterrupt

    ours.compute_loss = fail
    with pytest.raises(KeyboardInterrupt):
        ours.train()
    assert seen == [True]
    assert torch.nn.Module.parameters is before


def test_a_trainer_with_a_step_of_its_own_keeps_it(tmp_path):
    class Own(Trainer):
        def training_step(self, *args, **kwargs):
            steps.append(len(args) + len(kwargs))
            return super().training_step(*args, **kwargs)

    steps = []
    made = trainer(tmp_path)
    made.__class__ = Own
    report = sloth_plugins.patch(made.model, "trainer:bookkeeping", trainer=made)
    assert [o.state for o in report.outcomes if o.patch == "bookkeeping"] == ["applied"]
    made.train()
    assert len(steps) == 3

"""bitsandbytes' Adam in few launches: bit for bit bitsandbytes' own, in whatever order its parameters come."""

import contextlib
import copy
import io
import re

import pytest
import torch
from toy_patches import model

import sloth_plugins
from sloth_plugins.patches.trainers import optimizer_step

optim = pytest.importorskip("bitsandbytes.optim")
upstream = pytest.importorskip("bitsandbytes.optim.optimizer")
pytestmark = pytest.mark.usefixtures("_one_thread")

# Fewer elements than have states of 8 bits, no whole blocks, and a few that go together.
SHAPES = [(16, 512), (512, 16), (7, 3), (1000,), (4097,), (64, 64), (100, 100), (30000,), (8, 32), (2, 64, 64)]


@pytest.fixture
def calls(monkeypatch):
    """The number of elements of each update that bitsandbytes computes."""
    sizes = []
    for name in ("optimizer_update_8bit_blockwise", "optimizer_update_32bit"):
        original = getattr(upstream.F, name)

        def counted(kind, g, *args, original=original, **kwargs):
            sizes.append(g.numel())
            return original(kind, g, *args, **kwargs)

        monkeypatch.setattr(upstream.F, name, counted)
    return sizes


def parameters(dtype=torch.float32, shapes=SHAPES):
    random = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in shapes]


def gradients(params, step, without=()):
    random = torch.Generator().manual_seed(step)
    for index, p in enumerate(params):
        grad = torch.randn(p.shape, generator=random).to(p.dtype) * 0.1
        p.grad = None if index in without else grad


def train(optimizer, params, steps, without=lambda step: ()):
    for step in steps:
        gradients(params, step, without(step))
        optimizer.step()
        optimizer.zero_grad()


def assert_same(one, other):
    """Parameters and all that two optimizers hold of them."""
    for group, twin in zip(one.param_groups, other.param_groups, strict=True):
        for p, q in zip(group["params"], twin["params"], strict=True):
            assert torch.equal(p, q)
            state, expected = other.state[q], one.state[p]
            assert list(state) == list(expected)
            for name, value in expected.items():
                if torch.is_tensor(value):
                    assert state[name].dtype is value.dtype
                    assert torch.equal(state[name], value), name
                else:
                    assert state[name] == value, name


def pair(kind=optim.AdamW8bit, dtype=torch.float32, groups=lambda params: params, **options):
    """The parameters and the optimizers of two equal runs, stock and patched."""
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    stock, patched = parameters(dtype), parameters(dtype)
    return stock, kind(groups(stock), **options), patched, kind(groups(patched), **options)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit(dtype, decay, calls):
    stock, one, patched, other = pair(dtype=dtype, weight_decay=decay)
    train(one, stock, range(5))
    assert len(calls) == 5 * len(SHAPES)
    calls.clear()
    with optimizer_step._scope():
        train(other, patched, range(5))
    assert_same(one, other)
    alone = [4097, 10000, 30000]
    assert sorted(calls[-5:]) == sorted([*alone, 3 * 8192 + 4096, 7 * 3 + 1000 + 8 * 32])
    assert len(calls) == len(SHAPES) + 4 * 5


def test_groups_with_settings_and_dtypes_of_their_own(calls):
    def groups(params):
        params[1].data = params[1].data.bfloat16()
        params[5].data = params[5].data.bfloat16()
        return [{"params": params[:5], "lr": 3e-3}, {"params": params[5:], "weight_decay": 0.0}]

    stock, one, patched, other = pair(groups=groups)
    train(one, stock, range(4))
    calls.clear()
    with optimizer_step._scope():
        train(other, patched, range(4))
    assert_same(one, other)
    assert len(calls) < 4 * len(SHAPES)


@pytest.mark.parametrize("kind", [optim.AdamW, optim.Adam8bit, optim.Adam, optim.PagedAdamW8bit])
def test_other_adams(kind):
    stock, one, patched, other = pair(kind)
    with pytest.warns() if kind is optim.PagedAdamW8bit else contextlib.nullcontext():
        train(one, stock, range(4))
    with optimizer_step._scope():
        train(other, patched, range(4))
    assert_same(one, other)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (optim.Lion8bit, {}),
        (optim.RMSprop8bit, {}),
        (optim.LAMB8bit, {}),
        (optim.AdEMAMix8bit, {}),
        (optim.AdamW, {"optim_bits": 8, "is_paged": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_others_are_left_alone(kind, options, calls):
    params = parameters()
    with optimizer_step._scope():
        train(kind(params, lr=1e-3, **options), params, range(3))
    assert calls == [p.numel() for p in params] * 3


def test_an_optimizer_with_a_step_of_its_own_is_left_alone(calls):
    class Projected(optim.AdamW8bit):
        def step(self):
            for index, p in enumerate(self.param_groups[0]["params"]):
                if not self.state[p]:
                    self.init_state(self.param_groups[0], p, 0, index)
                p.grad = p.grad * 2
                self.update_step(self.param_groups[0], p, 0, index)

    stock, one, patched, other = pair(Projected)
    train(one, stock, range(3))
    with optimizer_step._scope():
        train(other, patched, range(3))
    assert_same(one, other)
    assert len(calls) == 6 * len(SHAPES)


def test_overrides_of_single_parameters():
    manager = upstream.GlobalOptimManager.get_instance()
    stock, one, patched, other = pair()
    try:
        for p in (stock[0], patched[0]):
            manager.override_config(p, "lr", 0.5)
        train(one, stock, range(4))
        with optimizer_step._scope():
            train(other, patched, range(4))
    finally:
        manager.initialize()
    assert_same(one, other)


def test_parameters_without_a_gradient_in_some_steps(calls):
    def without(step):
        return {2: (0, 3), 3: (0,), 5: (1, 2, 3, 4, 5, 6, 7, 8, 9), 6: range(10)}.get(step, ())

    stock, one, patched, other = pair()
    train(one, stock, range(9), without)
    calls.clear()
    with optimizer_step._scope():
        train(other, patched, range(9), without)
    assert_same(one, other)
    # Those that have left keep nothing of the others alive.
    storages = {id(state): state["state1"].untyped_storage() for state in other.state.values()}
    held = {storage.data_ptr(): storage.nbytes() for storage in storages.values()}
    assert sum(held.values()) == sum(state["state1"].nbytes for state in other.state.values())


def test_a_parameter_that_comes_later_and_one_twice():
    def added(optimizer, params):
        train(optimizer, params, range(3))
        late = torch.nn.Parameter(torch.ones(64, 64))
        params.append(late)
        optimizer.add_param_group({"params": [late]})
        optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(64, 128)))
        params.append(optimizer.param_groups[0]["params"][-1])
        train(optimizer, params, range(3, 6))
        optimizer.param_groups[0]["params"].append(params[0])
        train(optimizer, params, range(6, 9))

    stock, one, patched, other = pair(groups=list)
    added(one, stock)
    with optimizer_step._scope():
        added(other, patched)
    assert_same(one, other)


def test_what_is_saved_is_loaded_by_bitsandbytes_and_back():
    stock, one, patched, other = pair()
    train(one, stock, range(3))
    with optimizer_step._scope():
        train(other, patched, range(3))
        sizes = []
        for optimizer in (one, other):
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            sizes.append(file.tell())
        assert sizes[1] <= sizes[0]
        saved, theirs = other.state_dict(), one.state_dict()
        assert repr(saved) == repr(theirs)
        file.seek(0)
        one.load_state_dict(torch.load(file))
        other.load_state_dict(copy.deepcopy(theirs))
        train(other, patched, range(3, 6))
    train(one, stock, range(3, 6))
    assert_same(one, other)
    train(one, stock, range(6, 8))
    train(other, patched, range(6, 8))
    assert_same(one, other)


def test_states_that_somebody_replaces():
    def replacing(optimizer, params):
        train(optimizer, params, range(3))
        for state in optimizer.state.values():
            state["state2"] = state["state2"].clone()
            state["state1"].data = state["state1"].data.clone()
        optimizer.state[params[0]]["state1"] = optimizer.state[params[0]]["state1"].clone().add_(1)
        train(optimizer, params, range(3, 6))

    stock, one, patched, other = pair()
    replacing(one, stock)
    with optimizer_step._scope():
        replacing(other, patched)
    assert_same(one, other)


@pytest.mark.parametrize("again", ["the same gradients", "others in the same tensors", "other tensors"])
def test_after_an_interrupted_step_none_is_left_out(again, monkeypatch):
    _, _, params, optimizer = pair()
    get_config, asked = upstream.Optimizer8bit.get_config, []

    def interrupted(self, gindex, pindex, group):
        asked.append(pindex)
        if asked[-1] == 4:
            raise KeyboardInterrupt
        return get_config(self, gindex, pindex, group)

    with optimizer_step._scope():
        train(optimizer, params, range(3))
        gradients(params, 3)
        monkeypatch.setattr(upstream.Optimizer8bit, "get_config", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        monkeypatch.undo()
        # Two launches; the next parameter has no whole blocks.
        assert asked == [0, 0, 4]
        before = [optimizer.state[p]["step"] for p in params]
        assert before == [4, 4, 4, 4, 3, 4, 3, 3, 4, 4]
        if again == "others in the same tensors":
            for p in params:
                p.grad.mul_(2)
        elif again == "other tensors":
            gradients(params, 4)
        optimizer.step()
        after = [optimizer.state[p]["step"] for p in params]
    if again == "the same gradients":
        # bitsandbytes too repeats those that it came to, and only those.
        assert after == [5, 5, 5, 5, 4, 4, 4, 4, 4, 4]
    else:
        assert after == [step + 1 for step in before]


def test_an_interrupt_after_the_launch_leaves_parameters_and_states_of_one_step(monkeypatch):
    stock, one, patched, other = pair()
    train(one, stock, range(4))
    update = upstream.Optimizer2State.update_step

    def interrupted(*args):
        update(*args)
        if args[2].numel() == 3 * 8192 + 4096 and args[0].state[args[2]]["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(upstream.Optimizer2State, "update_step", interrupted)
    with pytest.raises(KeyboardInterrupt), optimizer_step._scope():
        train(other, patched, range(4))
    for index in (0, 1, 5, 9):
        assert torch.equal(stock[index], patched[index])
        assert other.state[patched[index]]["step"] == 4
    assert set(other.state) == set(patched)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_everything_is_restored(error):
    kinds = [vars(getattr(optim, name)).copy() for name in optimizer_step.ADAMS]
    before = vars(upstream.Optimizer2State)["update_step"], upstream.sync_gpu
    with contextlib.nullcontext() if error is None else pytest.raises(error), optimizer_step._scope():
        function = upstream.sync_gpu
        assert upstream.sync_gpu is not before[1]
        with optimizer_step._scope():
            assert upstream.sync_gpu == function
        assert "update_step" in vars(optim.AdamW8bit)
        if error is not None:
            raise error
    assert (vars(upstream.Optimizer2State)["update_step"], upstream.sync_gpu) == before
    for name, kind in zip(optimizer_step.ADAMS, kinds, strict=True):
        assert vars(getattr(optim, name)).keys() - {"step"} == kind.keys() - {"step"}


def test_nobody_waits_but_for_what_needs_it(monkeypatch):
    waited = []
    monkeypatch.setattr(upstream, "sync_gpu", waited.append)
    params = parameters()
    with optimizer_step._scope():
        train(optim.AdamW8bit(params), params, range(3))
        assert waited == []
        train(optim.Lion8bit(params), params, range(1))
    assert len(waited) == len(params)


def test_several_launches_and_large_tensors(monkeypatch, calls):
    monkeypatch.setattr(optimizer_step, "LAUNCH", 16384)
    monkeypatch.setattr(optimizer_step, "LARGEST", 8192)
    stock, one, patched, other = pair()
    train(one, stock, range(3))
    calls.clear()
    with optimizer_step._scope():
        train(other, patched, range(3))
    assert_same(one, other)
    assert sorted(calls[-6:]) == [1277, 4097, 10000, 12288, 16384, 30000]


def test_copies_hold_no_memory_between_steps():
    params = parameters()
    optimizer = optim.AdamW8bit(params)
    with optimizer_step._scope():
        train(optimizer, params, range(3))
        function = vars(optim.AdamW8bit)["update_step"]
        (steps,) = [cell.cell_contents for cell in function.__closure__]
        plans = [plan for plans in steps.joint[optimizer].plans.values() for plan in plans]
        assert len(plans) == 2
        assert all(tensor.untyped_storage().nbytes() == 0 for plan in plans for tensor in (plan.param, plan.grad))
        assert steps.joint[optimizer].marks == {}
        assert set(optimizer.state) == set(params)


def trained(folder, monkeypatch):
    """A trainer after six steps that are evaluated and saved meanwhile, and what it saved."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    # States of 8 bits, in spite of the size.
    smaller = tuple(256 if value == 4096 else value for value in optim.AdamW.__init__.__defaults__)
    monkeypatch.setattr(optim.AdamW.__init__, "__defaults__", smaller)
    network = get_peft_model(model(), LoraConfig(r=16, target_modules="all-linear", init_lora_weights="gaussian"))
    rows = [{"input_ids": (ids := [(7 * row + 3 * n) % 64 for n in range(8)]), "labels": ids} for row in range(16)]
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=6, report_to=[], disable_tqdm=True, optim="adamw_8bit",
        learning_rate=1e-2, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=2, save_steps=3,
    )  # fmt: skip
    trainer = Trainer(model=network, args=args, train_dataset=rows, eval_dataset=rows[:2])
    trainer.train()
    return trainer, torch.load(folder / "checkpoint-3" / "optimizer.pt")


def test_a_trainer_from_end_to_end(tmp_path, calls, monkeypatch, capsys):
    stock, saved = trained(tmp_path / "stock", monkeypatch)
    alone = len(calls)
    calls.clear()
    sloth_plugins.activate("trainer")
    patched, saved_too = trained(tmp_path / "patched", monkeypatch)
    assert len(re.findall(r"trainer:optimizer_step +1 +applied", capsys.readouterr().err)) == 1
    assert_same(stock.optimizer.optimizer, patched.optimizer.optimizer)
    assert repr(saved) == repr(saved_too)
    assert {state["state1"].dtype for state in patched.optimizer.optimizer.state.values()} == {torch.uint8}
    assert len(calls) < alone / 3
    assert "update_step" not in vars(optim.AdamW)


def test_another_optimizer_is_said_to_be_another(tmp_path):
    from transformers import Trainer, TrainingArguments

    network = model()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    report = sloth_plugins.patch(network, trainer=Trainer(model=network, args=args))
    (outcome,) = [outcome for outcome in report.outcomes if outcome.patch == "optimizer_step"]
    assert (outcome.state, outcome.modules) == ("skipped", 0)
    assert outcome.reason.startswith("config.optim: needs adamw_8bit or adamw_bnb_8bit, found ")

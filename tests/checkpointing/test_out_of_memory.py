"""Running out of memory in training: the micro-batch runs again, and the losses are those of a run without."""

import pytest
import torch
from counted import Counted
from lora_models import batch, gradients, lora_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from sloth_plugins import patch
from sloth_plugins.patches.blocks import attention_block, mlp_block
from sloth_plugins.patches.checkpointing import backbone
from sloth_plugins.patches.checkpointing.budget import Budget
from sloth_plugins.patches.checkpointing.stack import Stack
from sloth_plugins.patches.trainers import out_of_memory

STEPS = 24


@pytest.fixture
def device(monkeypatch):
    """Memory of which only the size counts."""
    memory = Counted(2**33)
    monkeypatch.setattr(backbone, "memory_of", lambda device: memory)
    monkeypatch.setattr(backbone, "_stacks", type(backbone._stacks)())
    return memory


def rows(count=64):
    draw = torch.Generator().manual_seed(7)
    lengths = torch.randint(4, 40, (count,), generator=draw).tolist()
    ids = [torch.randint(3, 96, (n,), generator=draw) for n in lengths]
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def collate(batch):
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}


def made(folder, selection, accumulation=1, dropout=0.0, steps=STEPS, kind=Trainer):
    model = lora_model(lora_dropout=dropout, changes={"num_hidden_layers": 4})
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=steps, per_device_train_batch_size=1, learning_rate=1e-2,
        gradient_accumulation_steps=accumulation, logging_steps=1, report_to=[], save_strategy="no",
        disable_tqdm=True, seed=5,
    )  # fmt: skip
    trainer = kind(model=model, args=args, train_dataset=rows(), data_collator=collate)
    if selection:
        patch(model, selection, trainer=trainer)
    return model, trainer


def train(*args, **kwargs):
    _, trainer = made(*args, **kwargs)
    trainer.train()
    return trainer


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


class Failing:
    """Every so manieth call of a function runs out of memory, once it may."""

    def __init__(self, monkeypatch, module, name, every, skip=8):
        self.calls = self.failures = 0
        original = getattr(module, name)

        def call(*args, **kwargs):
            self.calls += 1
            if self.calls > skip and self.calls % every == 0:
                self.failures += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)


SELECTION = "*:blocks,*:checkpointing,trainer:memory_plans"


@pytest.mark.parametrize(
    ("module", "name", "every", "accumulation", "dropout"),
    [
        (attention_block, "forward", 61, 3, 0.3),
        (mlp_block, "backward", 43, 1, 0.0),
        (mlp_block, "backward", 43, 3, 0.3),
    ],
    ids=["forward", "backward", "backward in accumulation"],
)
def test_losses_are_those_of_an_undisturbed_run(
    module, name, every, accumulation, dropout, device, tmp_path, monkeypatch
):
    expected = losses(train(tmp_path, "*:blocks,*:checkpointing", accumulation, dropout))
    failing = Failing(monkeypatch, module, name, every)
    found = losses(train(tmp_path, SELECTION, accumulation, dropout))
    assert failing.failures >= 2
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_failure_tightens_the_next_attempt_and_little_of_what_comes(device, tmp_path, monkeypatch):
    shares = []
    decide = Stack._decide

    def watching(self, shape):
        decide(self, shape)
        if self.current is not None:
            shares.append((self._attempt is not None, self.current.share))

    monkeypatch.setattr(Stack, "_decide", watching)
    failing = Failing(monkeypatch, mlp_block, "backward", 43)
    trainer = train(tmp_path, SELECTION)
    (stack,) = backbone.stacks_of(trainer.model)
    assert [share > 0 for again, share in shares if again] == [True] * failing.failures
    assert [share for again, share in shares if not again] == [0.0] * (len(shares) - failing.failures)
    assert 0.9 < stack.share < 1.0


def test_of_two_forwards_before_a_backward_either_may_be_tightened(device):
    model = lora_model(changes={"num_hidden_layers": 4})
    patch(model, "*:blocks,*:checkpointing")
    for _ in range(3):
        gradients(model, batch(4, 40))
    (stack,) = backbone.stacks_of(model)
    stack._tried.clear()
    model(input_ids=batch(4, 40))
    stack.budget = Budget("min")
    model(input_ids=batch(4, 40))
    assert stack.current.share == 1.0
    assert stack.tighten(0.9), "the first of both kept everything"
    model(input_ids=batch(4, 40))
    assert not stack.tighten(0.9)


def test_large_gradients_are_not_held_twice(device, tmp_path, monkeypatch):
    """Then a failure can be undone only before the backward."""
    expected = losses(train(tmp_path, "*:blocks,*:checkpointing", 3))
    monkeypatch.setattr(out_of_memory, "ASIDE", -1)
    Failing(monkeypatch, attention_block, "forward", 61)
    assert losses(train(tmp_path, SELECTION, 3)) == pytest.approx(expected, rel=1e-5)
    Failing(monkeypatch, attention_block, "backward", 90)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        train(tmp_path, SELECTION, 3)


def test_the_tightest_plan_that_fails_says_what_would_fit(device, tmp_path, monkeypatch):
    failing = Failing(monkeypatch, mlp_block, "backward", 1, skip=40)
    with pytest.raises(torch.OutOfMemoryError, match=r"the tightest plan for \d+ tokens does not fit; in .* about"):
        train(tmp_path, SELECTION)
    assert 3 < failing.failures < 100


def test_an_interrupt_leaves_the_gradients_from_before(device, tmp_path):
    held = []

    class Interrupted(Trainer):
        def compute_loss(self, *args, **kwargs):
            if held:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    class Holding(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            held.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    model, trainer = made(tmp_path, SELECTION, accumulation=3, kind=Interrupted)
    trainer.add_callback(Holding())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, held[0][name])


def test_other_errors_are_not_retried(device, tmp_path, monkeypatch):
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        raise RuntimeError("something else")

    monkeypatch.setattr(mlp_block, "backward", fail)
    with pytest.raises(RuntimeError, match="something else"):
        train(tmp_path, SELECTION)
    assert len(calls) == 1

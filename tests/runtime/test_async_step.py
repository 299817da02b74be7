"""Trainer without a wait for each loss: what it logs is what it was, also where losses are not finite."""

import math

import pytest
import torch
from launching import warm
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

import sloth_plugins

SCALES = [1.0, math.nan, 2.0, math.inf, -math.inf, 3.0, 1.0, math.nan]


class Scalar(torch.nn.Module):
    """A model whose loss is as large as its input says."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x, labels=None):
        return {"loss": (self.weight * 0.0 + x * 0.1).mean()}


def trainer(folder, kind=Trainer, collator=None, **options):
    rows = [{"x": torch.tensor(scale), "labels": torch.tensor(0)} for scale in SCALES]
    args = TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "max_steps": len(SCALES),
            "per_device_train_batch_size": 1,
            "learning_rate": 0.0,
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            **options,
        }
    )
    return kind(model=Scalar(), args=args, train_dataset=rows, data_collator=collator)


def patched(folder, *args, **options):
    made = trainer(folder, *args, **options)
    report = sloth_plugins.patch(made.model, "trainer:async_step", trainer=made)
    assert [o.state for o in report.outcomes if o.patch == "async_step"] == ["applied"]
    return made


def losses(made):
    result = made.train()
    return [row["loss"] for row in made.state.log_history if "loss" in row], result.training_loss


@pytest.mark.parametrize("logging", [1, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("keep", [True, False])
def test_what_is_logged_is_upstreams(tmp_path, logging, accumulation, keep):
    options = {
        "logging_steps": logging,
        "gradient_accumulation_steps": accumulation,
        "max_steps": len(SCALES) // accumulation,
        "logging_nan_inf_filter": keep,
    }
    expected, expected_mean = losses(trainer(tmp_path, **options))
    found, mean = losses(patched(tmp_path, **options))
    assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert mean == pytest.approx(expected_mean, rel=0, abs=0, nan_ok=True)
    assert all(map(math.isfinite, found)) is keep


class Reads(TorchDispatchMode):
    """Counts the values of tensors that the host asks for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_the_host_reads_no_loss_between_logs(tmp_path):
    counts = {}
    for make in (trainer, patched):
        made = make(tmp_path, logging_strategy="no", max_grad_norm=1.0)
        with Reads() as reads:
            made.train()
        counts[make] = reads.count
    assert counts[patched] <= counts[trainer] - len(SCALES)


class Careful(Trainer):
    """A user's trainer that looks at its losses itself."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.kinds = [*getattr(self, "kinds", []), (type(loss), bool(torch.isnan(loss)))]
        return loss


def test_a_trainer_that_looks_at_its_losses_sees_them(tmp_path):
    made = patched(tmp_path, Careful)
    made.train()
    assert len(made.kinds) == len(SCALES)
    assert {kind for kind, _ in made.kinds} == {torch.Tensor}
    assert sum(is_nan for _, is_nan in made.kinds) == sum(map(math.isnan, SCALES))


def test_a_loss_that_is_no_tensor_of_torch_is_left_alone(tmp_path):
    class Own(torch.Tensor):
        pass

    class Returning(Trainer):
        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs).as_subclass(Own)

    expected, _ = losses(trainer(tmp_path, Returning))
    found, _ = losses(patched(tmp_path, Returning))
    assert found == expected


def test_a_launched_trainer_keeps_all_its_patches(tmp_path):
    """Accelerator.prepare has the trainer looked at again, when its loop already runs."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = warm([script], tmp_path, flag="1")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "trainer:" in line]
    assert len(lines) == len({line.split()[0] for line in lines}), "one report"
    states = {line.split()[0]: line.split()[2] for line in lines}
    assert states["trainer:bookkeeping"] == states["trainer:async_step"] == "applied"
    assert "_without_waiting" in done.stdout


SCRIPT = """
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
rows = [{"input_ids": list(range(8)), "labels": list(range(8))} for _ in range(8)]
args = TrainingArguments(output_dir="out", use_cpu=True, max_steps=2, report_to=[], save_strategy="no")
trainer = Trainer(model=LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), args=args, train_dataset=rows)
compute_loss = trainer.compute_loss
def watching(*args, **kwargs):
    print(trainer.training_step.__qualname__, vars(trainer)["training_step"].__code__.co_qualname)
    return compute_loss(*args, **kwargs)
trainer.compute_loss = watching
trainer.train()
"""


def test_nothing_is_left_after_training_or_an_interrupt(tmp_path):
    made = patched(tmp_path)
    made.train()
    assert "training_step" not in vars(made)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    made.training_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert made.training_step is interrupt


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize(
    ("collator", "pinned", "expected"), [(None, True, True), (None, False, False), (collate, True, False)]
)
def test_batches_are_copied_without_a_wait_where_nobody_writes_to_them_again(tmp_path, collator, pinned, expected):
    seen = []

    class Seeing(Trainer):
        def get_train_dataloader(self):
            loader = super().get_train_dataloader()
            seen.append(loader._non_blocking)
            return loader

    made = patched(tmp_path, Seeing, collator)
    # TrainingArguments itself says no without an accelerator.
    made.args.dataloader_pin_memory = pinned
    made.train()
    assert seen == [expected]
    assert made.accelerator.dataloader_config.non_blocking is False

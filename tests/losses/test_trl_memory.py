"""The memory of a training step of TRL's trainers, stock against patched, by counting what lives."""

import random

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from live_bytes import LiveBytes
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import sloth_plugins

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
VOCABULARY = 4096


@pytest.fixture(scope="module")
def tokenizer():
    from sloth_plugins.demo.prepare import build_tokenizer

    disable_progress_bars()
    pairs = [{"instruction": f"{n}+{n}=", "response": str(2 * n)} for n in range(200)]
    return build_tokenizer(pairs, VOCABULARY)


def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **ids))


def text(words):
    return " ".join(str(words.randrange(50)) for _ in range(20))


def orpo(common):
    return ORPOTrainer, ORPOConfig(**common), {}


def dpo(common):
    return DPOTrainer, DPOConfig(**common), {}


def grpo(common):
    config = GRPOConfig(**{**common, "per_device_train_batch_size": 8}, num_generations=4, max_completion_length=16)
    return GRPOTrainer, config, {"reward_funcs": lambda completions, **columns: [float(len(c)) for c in completions]}


def peak_of_a_step(make, tokenizer, folder, *, patched):
    common = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "gradient_checkpointing": False,
    }
    kind, config, parts = make(common)
    words = random.Random(0)
    rows = [{"prompt": text(words), "chosen": " " + text(words), "rejected": " " + text(words)} for _ in range(8)]
    trainer = kind(
        model=model(),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        **parts,
    )
    if patched:
        report = sloth_plugins.patch(trainer.model, trainer=trainer)
        assert any(outcome.state == "applied" for outcome in report.outcomes if outcome.trainer)
    trainer.model.train()
    torch.manual_seed(0)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    with LiveBytes() as live:
        loss = trainer.training_step(trainer.model, batch, None)
    return live.peak, float(loss)


@pytest.mark.parametrize(("make", "share"), [(orpo, 0.5), (dpo, 1.0), (grpo, 1.0)])
def test_the_peak_of_a_step(make, share, tokenizer, tmp_path, monkeypatch):
    # On a batch this small the default tile would hold all of it.
    monkeypatch.setattr("sloth_plugins.patches.losses.rows.CPU_TILE_BYTES", 16 * VOCABULARY * 4)
    stock, loss = peak_of_a_step(make, tokenizer, tmp_path, patched=False)
    ours, same = peak_of_a_step(make, tokenizer, tmp_path, patched=True)
    assert same == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert ours <= share * stock, f"{ours / stock:.2f} of stock's {stock / 2**20:.1f} MiB"

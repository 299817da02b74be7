"""TRL's trainers sample completions by the decoder, and learn what they learn without it."""

import pytest
import torch
from datasets import Dataset
from lora_models import KNOWN, tiny_model
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from sloth_plugins import patch

KINDS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def tokenizer():
    words = {str(number): number for number in range(96)}
    core = Tokenizer(models.WordLevel(words, "0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="2", bos_token="0", eos_token="1")


def trainer_of(kind, folder, completions, **options):
    """A trainer whose rewards keep the completions that they are asked about."""

    def reward(completions, **columns):
        kept.extend(completions)
        return [float(len(text) % 7) for text in completions]

    kept = completions
    trainer, config = KINDS[kind]
    model = tiny_model(KNOWN.architectures["llama"], "llama", seed=0)
    # Some rows end early: the end is often drawn.
    model.get_output_embeddings().weight.data[1] += 0.1
    given = {
        **{"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 6, "num_generations": 3},
        **{"max_completion_length": 10, "beta": 0.04, "use_cpu": True, "report_to": "none", "seed": 1},
        **{"logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no", "bf16": False, "disable_tqdm": True},
    }
    rows = [{"prompt": " ".join(str(3 + n + i) for i in range(2 + n % 3))} for n in range(8)]
    return trainer(
        model=model,
        reward_funcs=reward,
        args=config(**given, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )


def logged(trainer):
    names = ("loss", "reward", "kl", "entropy", "completions/mean_length", "grad_norm")
    return [[entry[name] for name in names if name in entry] for entry in trainer.state.log_history]


@pytest.mark.parametrize(("kind", "options"), [("grpo", {"gradient_checkpointing": True}), ("rloo", {})])
def test_the_same_completions_and_losses(kind, options, tmp_path, decoded, said):
    torch.manual_seed(0)
    expected, stock = [], None
    stock = trainer_of(kind, tmp_path, expected, **options)
    stock.train()
    assert not decoded
    torch.manual_seed(0)
    found = []
    patched = trainer_of(kind, tmp_path, found, **options)
    report = patch(patched.model, trainer=patched)
    assert "rollout_decoding" in [outcome.patch for outcome in report.outcomes if outcome.state == "applied"]
    patched.train()
    assert len(decoded) == 2
    assert not [line for line in said if "generat" in line]
    assert found == expected
    assert len({len(text) for text in found}) > 2
    for one, other in zip(logged(patched), logged(stock), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    # The model has its own method again, and so has the trainer once it is taken back.
    assert "generate" not in vars(patched.model)
    patch(patched.model, "off", trainer=patched)
    assert type(patched) is KINDS[kind][0]

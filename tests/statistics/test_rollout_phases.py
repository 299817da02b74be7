"""TRL's trainers that sample: where the time of their steps goes, and how many tokens they have trained."""

import re

import pytest
from datasets import Dataset
from peft import LoraConfig
from tiny_runs import SIZES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

import sloth_plugins
from sloth_plugins.statistics.history import PHASES, SAMPLED, SECONDS, SPEED

pytestmark = pytest.mark.usefixtures("_one_thread")
KINDS = {
    "grpo": (GRPOTrainer, GRPOConfig, {"num_generations": 3, "max_completion_length": 6}),
    "rloo": (RLOOTrainer, RLOOConfig, {"num_generations": 3, "max_completion_length": 6}),
    "online_dpo": (OnlineDPOTrainer, OnlineDPOConfig, {"max_new_tokens": 6}),
}


def tokenizer():
    core = Tokenizer(models.WordLevel({str(number): number for number in range(SIZES["vocab_size"])}, "0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"model_input_names": ["input_ids", "attention_mask"]}  # an old `generate` refuses others
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="2", bos_token="0", eos_token="1", **names)


def trained(kind, folder, **options):
    """A trainer that has made two steps of two micro-batches each, with prompts of two to four tokens."""
    trainer, config, own = KINDS[kind]
    given = {
        **{"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 6, "logging_steps": 1},
        **{"gradient_accumulation_steps": 2, "beta": 0.04, "use_cpu": True, "report_to": "none", "bf16": False},
        **{"save_strategy": "no", "disable_tqdm": True, **own, **options},
    }
    set_seed(0)
    made = trainer(
        model=LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=0, eos_token_id=1, pad_token_id=2)),
        reward_funcs=lambda completions, **columns: [float(len(text) % 7) for text in completions],
        args=config(**given),
        train_dataset=Dataset.from_list([{"prompt": "3 4 5 6"[: 3 + 2 * (n % 3)]} for n in range(24)]),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    sloth_plugins.patch(made.model, "1", trainer=made)
    made.train()
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_phases_add_up_to_no_more_than_the_step(kind, tmp_path, capsys):
    made = trained(kind, tmp_path)
    entries = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        seconds = [entry[f"{phase}_seconds"] for phase in PHASES if phase != "sync"]
        assert min(seconds) > 0
        assert 0.5 * entry[SECONDS] < sum(seconds) <= entry[SECONDS] + 1e-4
        assert "sync_seconds" not in entry
    assert re.search("where it went +rollout ", capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_tokens_are_those_of_prompts_and_completions_without_padding(kind, tmp_path):
    made = trained(kind, tmp_path)
    seen = 0
    for entry in made.state.log_history[:2]:
        tokens, seen = entry["num_tokens"] - seen, entry["num_tokens"]  # as TRL counts them
        assert entry[SPEED] * entry[SECONDS] == pytest.approx(tokens, rel=1e-2)
        sampled = 12 * entry["completions/mean_length"]
        assert entry[SAMPLED] * entry["rollout_seconds"] == pytest.approx(sampled, rel=1e-2)


def test_a_step_without_rollouts_shows_none(tmp_path):
    made = trained("grpo", tmp_path, num_iterations=2)
    first, second = made.state.log_history[:2]
    assert {"rollout_seconds", "reward_seconds", SAMPLED} <= first.keys()
    assert not {"rollout_seconds", "reward_seconds", SAMPLED} & second.keys()
    assert {"loss_seconds", SPEED} <= second.keys()

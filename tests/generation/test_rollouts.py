"""TRL's trainers sample completions by the decoder, and learn what they learn without it."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from lora_models import KNOWN, tiny_model
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from sloth_plugins import patch
from sloth_plugins.patches.trainers import unpadded

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
    # On a CPU documents are told apart without a mask where heads do not share keys.
    model = tiny_model(KNOWN.architectures["llama"], "llama", seed=0, num_key_value_heads=4)
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
def test_the_same_completions_and_losses(kind, options, tmp_path, decoded, said, runs):
    torch.manual_seed(0)
    expected, stock = [], None
    stock = trainer_of(kind, tmp_path, expected, **options)
    stock.train()
    assert not decoded
    torch.manual_seed(0)
    found = []
    patched = trainer_of(kind, tmp_path, found, **options)
    report = patch(patched.model, "1", trainer=patched)
    applied = {outcome.patch for outcome in report.outcomes if outcome.state == "applied"}
    assert {"rollout_decoding", "rollout_unpadded", "trl_logprobs", "blocks"} <= applied
    patched.train()
    assert len(decoded) == 2
    assert not [line for line in said if "generat" in line or "padding" in line]
    # Fused, and without padding: the loss, with adapters, and the reference pass, without.
    assert {run.attention.documents is not None for run in runs} == {True}
    assert {(run.is_differentiable, bool(run.parts.qkv.present())) for run in runs} >= {(True, True), (False, False)}
    assert found == expected
    assert len({len(text) for text in found}) > 2
    for one, other in zip(logged(patched), logged(stock), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    # The model has its own method again, and so has the trainer once it is taken back.
    assert "generate" not in vars(patched.model)
    patch(patched.model, "off", trainer=patched)
    assert type(patched) is KINDS[kind][0]


@pytest.mark.parametrize(
    ("mask", "packs"),
    [([[0, 1, 1, 1], [1, 1, 1, 0]], True), ([[1, 1, 1, 1]], False), ([[1, 0, 1, 1], [1, 1, 1, 1]], False)],
    ids=["padding", "no padding", "a hole"],
)
def test_only_padding_is_left_out(mask, packs):
    """A hole between tokens is distance that a packed row would forget."""
    got = []

    def model(**given):
        got.append(given)
        length = given["input_ids"].numel() if packs else given["input_ids"].shape[1]
        values = torch.arange(1.0, length)[None].expand(len(given["input_ids"]), -1)
        return SimpleNamespace(log_probs=values, entropy=None)

    mask = torch.tensor(mask)
    ids = torch.arange(10, 10 + mask.numel()).view(mask.shape)
    found = unpadded._packed(model, input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
    assert ("attention_mask" not in got[0]) == packs
    assert found.log_probs.shape == (len(mask), 3)
    if packs:
        assert got[0]["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
        # The first token of a document is nobody's label.
        assert got[0]["labels"].tolist() == [[-100, 12, 13, -100, 15, 16]]
        # A value stands where its token does: 11 in the second column, which begins the row and has none.
        assert found.log_probs.tolist() == [[0, 1, 2], [4, 5, 0]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_attn_implementation": "eager"}, "its attention is eager"),
        ({}, "its layers are not patched"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "depends on the length of a row",
        ),
    ],
    ids=["eager", "stock layers", "dynamic rotary embedding"],
)
def test_why_padding_stays(change, reason):
    model = tiny_model(KNOWN.architectures["llama"], "llama", seed=0)
    for name, value in change.items():
        setattr(model.config, name, value)
    assert reason in unpadded._obstacle(model)

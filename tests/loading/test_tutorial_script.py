"""A typical tutorial, of which only the import, the model's path and the data file are changed, against plain PEFT."""

import json
import re

import peft
import pytest
import torch
import transformers
from launching import warm
from loading_pairs import PAIRS

pytestmark = pytest.mark.slow

TUTORIAL = """
from unsloth import FastLanguageModel
from trl import SFTTrainer
from transformers import TrainingArguments
from datasets import load_dataset
import torch
model, tokenizer = FastLanguageModel.from_pretrained(model_name="...", max_seq_length=2048, dtype=None, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=16, target_modules=["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"],
    lora_alpha=32, lora_dropout=0, bias="none", use_gradient_checkpointing="unsloth", random_state=42)
def format_prompts(batch):
    return {"text": [i + o + tokenizer.eos_token for i, o in zip(batch["instruction"], batch["response"])]}
dataset = load_dataset("json", data_files="train.jsonl", split="train").map(format_prompts, batched=True)
trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=dataset, dataset_text_field="text", max_seq_length=2048,
    args=TrainingArguments(per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_steps=5, num_train_epochs=3, learning_rate=2e-4,
        fp16=not torch.cuda.is_bf16_supported(), bf16=torch.cuda.is_bf16_supported(), logging_steps=10, optim="adamw_8bit",
        weight_decay=0.01, lr_scheduler_type="cosine", output_dir="outputs"))
stats = trainer.train(); print(stats.metrics["train_runtime"])
"""  # noqa: E501 - as people have it
CHANGES = {"from unsloth import": "from sloth_plugins import", '"..."': '"tiny"', '"train.jsonl"': '"pairs.jsonl"'}

PLAIN = """
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
from trl import SFTConfig, SFTTrainer
import torch
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained("tiny", dtype=torch.float32, quantization_config=nf4)
tokenizer = AutoTokenizer.from_pretrained("tiny")
set_seed(42)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
def format_prompts(batch):
    return {"text": [i + o + tokenizer.eos_token for i, o in zip(batch["instruction"], batch["response"])]}
dataset = load_dataset("json", data_files="pairs.jsonl", split="train").map(format_prompts, batched=True)
trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=dataset,
    args=SFTConfig(per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_steps=5, num_train_epochs=3,
        learning_rate=2e-4, bf16=False, use_cpu=True, logging_steps=10, optim="adamw_8bit", weight_decay=0.01,
        lr_scheduler_type="cosine", output_dir="outputs", max_length=2048))
trainer.train()
"""
LOOK = """
import json
model.save_pretrained("saved"); tokenizer.save_pretrained("saved")
keys = ("loss", "train_loss", "grad_norm", "learning_rate")
logged = [{key: entry[key] for key in keys if key in entry} for entry in trainer.state.log_history]
model.eval()
with torch.no_grad():
    logits = model(input_ids=torch.arange(3, 13)[None]).logits[0, -1].tolist()
json.dump({"logged": logged, "logits": logits}, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory):
    """Run a script beside the model and the data; returns its folder, what it left, and what it said."""

    def run_script(script, flag):
        folder = tmp_path_factory.mktemp("script")
        (folder / "tiny").symlink_to(tiny)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS[:32]))
        (folder / "script.py").write_text(script + LOOK)
        done = warm(["script.py"], folder, flag)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder, json.loads((folder / "found.json").read_text()), done.stderr

    return run_script


@pytest.fixture(scope="module")
def tutorial(ran):
    script = TUTORIAL
    for old, new in CHANGES.items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    return ran(script, None)


def test_it_trains_and_says_what_it_does(tutorial):
    folder, found, said = tutorial
    losses = [entry["loss"] for entry in found["logged"] if "loss" in entry]
    assert len(losses) == 1
    assert found["logged"][-1]["train_loss"] > 0
    assert re.search(r"llama:rms_norm +5 +applied", said)
    for row in ("llama:checkpointing", "trainer:memory_plans", "trl:trl_legacy_arguments"):
        assert re.search(rf"{row} +1 +applied", said), row
    moved = "dataset_text_field -> SFTConfig.dataset_text_field, max_seq_length -> SFTConfig.max_length"
    assert f"{moved}, tokenizer -> processing_class" in said
    assert (folder / "outputs" / "checkpoint-12").is_dir()


def test_a_plain_script_with_the_flag_has_the_same_losses(tutorial, ran):
    _, found, _ = tutorial
    _, plain, said = ran(PLAIN, "1")
    assert re.search(r"llama:rms_norm +5 +applied", said)
    assert "trl_legacy_arguments" not in said
    assert plain == found


def test_the_saved_adapters_load_in_stock_peft(tutorial):
    folder, found, _ = tutorial
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "tiny", dtype=torch.float32, quantization_config=quantised
    )
    model = peft.PeftModel.from_pretrained(base, folder / "saved").eval()
    # PEFT makes them float32; TRL has them in bfloat16 on a quantised base.
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 13)[None]).logits[0, -1]
        with model.disable_adapter():
            without = model(input_ids=torch.arange(3, 13)[None]).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(found["logits"]), atol=1e-6, rtol=1e-6)
    assert (logits - without).abs().max() > 1e-4
    assert transformers.AutoTokenizer.from_pretrained(folder / "saved").eos_token

"""A model of the loader's and one of plain PEFT's, both patched, train alike; their layers run as blocks."""

import peft
import pytest
import torch
import transformers

from sloth_plugins import FastLanguageModel, activate

OPTIONS = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
TOKENS = torch.randint(3, 300, (12, 16), generator=torch.Generator().manual_seed(1)).tolist()
ROWS = [{"input_ids": row, "labels": row} for row in TOKENS]


def losses(model, folder):
    args = transformers.TrainingArguments(
        output_dir=folder, **OPTIONS, max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2
    )
    trainer = transformers.Trainer(model=model, args=args, train_dataset=ROWS)
    trainer.train()
    return [entry["grad_norm"] for entry in trainer.state.log_history[:-1]], trainer.state.log_history[-1]["train_loss"]


@pytest.mark.parametrize("how", ["unsloth", False])
def test_the_loader_and_the_flag(tiny, tmp_path, capsys, how):
    model, _ = FastLanguageModel.from_pretrained(str(tiny), 64)
    adapted = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=how, random_state=7)
    found = losses(adapted, tmp_path)
    said = [line.split()[:3] for line in capsys.readouterr().err.splitlines() if "applied" in line]
    assert ["llama:blocks", "2", "applied"] in said
    activate("1")
    transformers.set_seed(7)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    assert losses(peft.get_peft_model(stock, config), tmp_path) == found
    assert len(set(found[0])) == 6

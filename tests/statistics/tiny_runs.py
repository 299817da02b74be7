"""A tiny Llama with adapters and a Trainer around it."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import sloth_plugins

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
ROW = list(range(8))


def trainer(folder, kind=Trainer, callbacks=(), compute_metrics=None, **options):
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), LoraConfig(r=2, target_modules="all-linear"))
    rows = [{"input_ids": ROW, "labels": ROW} for _ in range(8)]
    options = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", **options}
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=4, **options
    )
    return kind(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=list(callbacks),
        compute_metrics=compute_metrics,
    )


def patched(folder, *args, **options):
    made = trainer(folder, *args, **options)
    report = sloth_plugins.patch(made.model, "trainer:statistics", trainer=made)
    assert [o.state for o in report.outcomes if o.patch == "statistics"] == ["applied"]
    return made


def logged(made, name="loss"):
    return [entry[name] for entry in made.state.log_history if name in entry]

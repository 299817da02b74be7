"""What the training scripts under test share: a tiny model, fixed data, and losses written by the main process."""

import argparse
import json
import os
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

TINY = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
    "use_cpu": True,
}


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--losses")
    parser.add_argument("--model", help="a folder; without one, a tiny model with random weights")
    parser.add_argument("--model-type", default="llama")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", default="out")
    return parser.parse_args()


def model(model_type="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **TINY))


def rows(count=64, length=24):
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(3, 96, (count, 1), generator=generator)
    step = torch.randint(1, 5, (count, 1), generator=generator)
    return ((start + step * torch.arange(length)) % 93 + 3).tolist()


def write(path, losses):
    if path and os.environ.get("RANK", "0") == "0":
        with open(path, "w") as file:
            json.dump(losses, file)


def end(accelerator):
    """End the process: where there are several, torch may abort one that finalises while gloo's threads still run."""
    accelerator.end_training()
    if accelerator.num_processes > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

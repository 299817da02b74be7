"""A user's own script: GRPO on generated sums, rewarded by how near the answer is.

python sums_model.py FOLDER && SLOTH_PLUGINS=1 python train_grpo_sums.py --model FOLDER --cpu

Two minutes on two cores, with OMP_NUM_THREADS=1: threads that wait for each other take longer than so small a model.
"""

import argparse
import random
import re

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--out", default="grpo_sums")
parser.add_argument("--cpu", action="store_true")
args = parser.parse_args()


def nearness(completions, answer, **columns):
    """1 for the right sum, less for a number that is farther away, 0 for none."""
    found = [re.search(r"\d+", completion) for completion in completions]
    return [
        1 / (1 + abs(int(number[0]) - right)) if number else 0.0 for number, right in zip(found, answer, strict=True)
    ]


numbers = random.Random(0)
sums = [(numbers.randrange(10), numbers.randrange(10)) for _ in range(2000)]
trainer = GRPOTrainer(
    model=args.model,
    reward_funcs=nearness,
    args=GRPOConfig(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=256,
        num_generations=8,
        max_completion_length=3,
        learning_rate=2e-3,
        beta=0.01,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        bf16=not args.cpu,
        use_cpu=args.cpu,
    ),
    train_dataset=Dataset.from_list([{"prompt": f"{a}+{b}=", "answer": a + b} for a, b in sums]),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
trainer.train()

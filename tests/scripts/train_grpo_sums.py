"""A user's own script: GRPO on generated sums, rewarded by how near the answer is; prints the reward.

SLOTH_PLUGINS=1 python train_grpo_sums.py --model FOLDER --steps 60
"""

import argparse
import random
import statistics

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--out", default="grpo_sums")
parser.add_argument("--cpu", action="store_true")
args = parser.parse_args()


def nearness(completions, answer, **columns):
    """1 for the right sum, less for one that is farther away, 0.3 for any number, 0 for what is none."""
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        text = completion.strip()
        rewards.append(0.3 + 0.7 / (1 + abs(int(text) - right) / 10) if text.isdecimal() else 0.0)
    return rewards


numbers = random.Random(0)
sums = [(numbers.randrange(50), numbers.randrange(50)) for _ in range(2000)]
trainer = GRPOTrainer(
    model=args.model,
    reward_funcs=nearness,
    args=GRPOConfig(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=32,
        num_generations=16,
        max_completion_length=6,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        beta=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=not args.cpu,
        use_cpu=args.cpu,
    ),
    train_dataset=Dataset.from_list([{"prompt": f"{a}+{b}=", "answer": a + b} for a, b in sums]),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
trainer.train()
rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
edge = max(1, len(rewards) // 6)
print(f"reward {statistics.mean(rewards[:edge]):.3f} at first, {statistics.mean(rewards[-edge:]):.3f} at last")

"""A user's own script: TRL's GRPOTrainer with a PEFT config and a reward by rule, on sums like `12+7=`."""

import random

from common import arguments, write
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl_parts import OPTIONS, adapters, logged

args = arguments()
completed = []


def is_the_sum(prompts, completions, **columns):
    completed.extend(completions)
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        answer = completion.split("\n")[0].strip()
        left, right = prompt.removesuffix("=").split("+")
        digits = sum(letter.isdigit() for letter in completion) / max(len(completion), 1)
        rewards.append(1.0 if answer == str(int(left) + int(right)) else 0.5 * digits)
    return rewards


numbers = random.Random(0)
trainer = GRPOTrainer(
    model=args.model,
    reward_funcs=is_the_sum,
    args=GRPOConfig(
        output_dir=args.out,
        max_steps=args.steps,
        **{**OPTIONS, "per_device_train_batch_size": 8, "learning_rate": 1e-3},
        gradient_checkpointing=args.checkpointing,
        bf16=False,
        num_generations=4,
        max_completion_length=8,
        beta=0.04,
    ),
    train_dataset=Dataset.from_list(
        [{"prompt": f"{numbers.randrange(50)}+{numbers.randrange(50)}="} for _ in range(32)]
    ),
    processing_class=AutoTokenizer.from_pretrained(args.model),
    peft_config=adapters(),
)
trainer.train()
write(args.losses, {"logged": logged(trainer), "completions": completed})

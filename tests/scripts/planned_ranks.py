"""Two processes with unequal memory, replicated: their plans are alike, and gradients are the mean of stock's.

Its models are those of tests/blocks, and its memory that of tests/checkpointing, which must be on the path.
"""

import os

import torch.distributed as dist
from counted import Counted
from lora_models import batch, lora_model
from transformers import Trainer, TrainingArguments

from sloth_plugins import patch
from sloth_plugins.patches.checkpointing import backbone

dist.init_process_group("gloo")
rank = dist.get_rank()
memory = Counted()
backbone.memory_of = lambda device: memory
ids = batch(8, 40, seed=1)
rows = [{"input_ids": row, "labels": row} for row in ids for _ in range(2)]
args = TrainingArguments(
    output_dir=os.environ["OUT"], use_cpu=True, max_steps=4, per_device_train_batch_size=1, learning_rate=0.0,
    report_to=[], save_strategy="no", disable_tqdm=True, max_grad_norm=0.0, gradient_accumulation_steps=2,
)  # fmt: skip
with memory.counting:
    model = lora_model(changes={"num_hidden_layers": 6})
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    patch(model, "*:blocks,*:checkpointing,trainer:memory_plans", trainer=trainer)
    # Enough for a part of the activations on one, for everything on the other.
    memory.size = memory.allocated() + (700_000 if rank == 0 else 2**40)
    trainer.train()
(stack,) = backbone.stacks_of(model)
print(f"plan {[option.policy.value for option in stack.current.options]} ceiling {stack.ceiling}\n", end="", flush=True)
dist.barrier()
os._exit(0)

"""A user's own script: transformers.Trainer with PEFT."""

from common import OPTIONS, TARGETS, arguments, end, model, rows, write
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

args = arguments()
network = get_peft_model(model(args.model_type), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="gaussian"))
data = [{"input_ids": row, "labels": row} for row in rows()]
trainer = Trainer(
    model=network,
    args=TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        **OPTIONS,
        gradient_checkpointing=args.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if args.checkpointing else None,
    ),
    train_dataset=data,
)
trainer.train()
write(args.losses, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
end(trainer.accelerator)

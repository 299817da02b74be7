"""A user's own script: TRL's DPOTrainer with a PEFT config."""

from common import arguments, write
from trl import DPOConfig, DPOTrainer
from trl_parts import OPTIONS, adapters, logged, model, pairs, tokenizer

args = arguments()
trainer = DPOTrainer(
    model=model(args.model_type),
    args=DPOConfig(
        output_dir=args.out,
        max_steps=args.steps,
        **OPTIONS,
        gradient_checkpointing=args.checkpointing,
        bf16=False,
    ),
    train_dataset=pairs(),
    processing_class=tokenizer(),
    peft_config=adapters(),
)
trainer.train()
write(args.losses, logged(trainer))

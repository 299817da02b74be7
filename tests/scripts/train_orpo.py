"""A user's own script: TRL's ORPOTrainer with a PEFT config."""

from common import arguments, write
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl_parts import OPTIONS, adapters, logged, model, pairs, tokenizer

args = arguments()
trainer = ORPOTrainer(
    model=model(args.model_type),
    args=ORPOConfig(
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

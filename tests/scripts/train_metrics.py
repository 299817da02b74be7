"""A user's own script: Trainer with metrics from logits, evaluated before and after."""

import numpy
from common import OPTIONS, arguments, end, model, rows, write
from transformers import Trainer, TrainingArguments

args = arguments()


def metrics(prediction):
    guesses = prediction.predictions[:, :-1].argmax(-1)
    right = guesses == prediction.label_ids[:, 1:]
    return {"accuracy": float(right.mean()), "top": float(numpy.abs(prediction.predictions).max())}


data = [{"input_ids": row, "labels": row} for row in rows(32)]
trainer = Trainer(
    model=model(args.model_type),
    args=TrainingArguments(output_dir=args.out, max_steps=args.steps, **OPTIONS, per_device_eval_batch_size=5),
    train_dataset=data,
    eval_dataset=data[:13],
    compute_metrics=metrics,
)
found = [trainer.evaluate()]
trainer.train()
found += [trainer.evaluate()]
names = ("eval_loss", "eval_accuracy", "eval_top")
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
write(args.losses, losses + [entry[name] for entry in found for name in names])
end(trainer.accelerator)

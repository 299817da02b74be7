"""A user's own script: TRL's SFTTrainer with a PEFT config."""

from common import OPTIONS, TARGETS, arguments, model, rows, write
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

args = arguments()
words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **{str(i): i for i in range(3, 96)}}, "<pad>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
trainer = SFTTrainer(
    model=model(args.model_type),
    args=SFTConfig(
        output_dir=args.out,
        max_steps=args.steps,
        **OPTIONS,
        gradient_checkpointing=args.checkpointing,
        bf16=False,
    ),
    train_dataset=Dataset.from_list([{"text": " ".join(map(str, row))} for row in rows()]),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, target_modules=TARGETS),
)
trainer.train()
write(args.losses, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

"""A small Llama that writes sums as it has seen them: mostly wrong. For GRPO to mend, where there is no model hub.

python sums_model.py FOLDER
"""

import random
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LARGEST = 10
RIGHT = 0.3
"""The part of the answers that are surely right; the others are off by at most 9, or not at all."""
STEPS, BATCH = 300, 256


def tokenizer():
    """A token for each character."""
    tokens = ["<pad>", "<s>", "</s>", *"0123456789+="]
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, "<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )


def written(numbers):
    """A line such as `12+7=19`, or `12+7=23`."""
    left, right = numbers.randrange(LARGEST), numbers.randrange(LARGEST)
    error = 0 if numbers.random() < RIGHT else numbers.randrange(-9, 10)
    return f"{left}+{right}={max(0, left + right + error)}</s>"


def main(folder):
    """Train all weights on such lines, for a minute on a CPU."""
    torch.manual_seed(0)
    numbers, words = random.Random(0), tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=STEPS)
    for step in range(STEPS):
        batch = words([written(numbers) for _ in range(BATCH)], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    print(f"{model.num_parameters():,} parameters in {folder}")


if __name__ == "__main__":
    main(sys.argv[1])

"""What the TRL scripts share: a tokenizer of words, preference pairs, and everything that a run has logged."""

from common import OPTIONS, TARGETS, model, rows
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TIMES = ("runtime", "per_second", "time", "flos", "_seconds", "memory_gib")


def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{str(number): number for number in range(3, 96)}}
    core = Tokenizer(models.WordLevel(words, "<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def adapters():
    return LoraConfig(r=4, target_modules=TARGETS)


def pairs(count=32):
    """Prompts that count on, completions that go on counting or do not."""
    right, wrong = rows(count), rows(count)[::-1]
    return Dataset.from_list(
        [
            {
                "prompt": " ".join(map(str, good[:8])),
                "chosen": " " + " ".join(map(str, good[8:20])),
                "rejected": " " + " ".join(map(str, bad[8:18])),
            }
            for good, bad in zip(right, wrong, strict=True)
        ]
    )


def logged(trainer):
    """What the trainer has logged at each step, without times."""
    return [
        {key: value for key, value in entry.items() if isinstance(value, float) and not key.endswith(TIMES)}
        for entry in trainer.state.log_history
    ]


__all__ = ["OPTIONS", "adapters", "logged", "model", "pairs", "tokenizer"]

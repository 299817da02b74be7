"""The cell of dynamic 4-bit: exactly the listed modules stay in 16 bits, from disk and on the fly."""

import tempfile
from pathlib import Path
from typing import Any

from verdicts import Cell

KIND, NAME = "BitsAndBytesConfig", "llm_int8_skip_modules"
# So many that one layer's path begins another's: layers.1 and layers.11.
LAYERS = 12


def save_model(folder: Path) -> None:
    """A random Llama in bf16, with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    alphabet = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(alphabet, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)


def kept_in(model: Any) -> set[str]:
    """The paths of linear layers that are not in 4 bits."""
    import torch

    return {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}


def run(cell: Cell) -> None:
    """Quantise, load what was written, load the original with the same list, and hold all three to each other."""
    import torch
    from transformers import AutoModelForCausalLM

    from sloth_plugins.quantization import dynamic_config, quantize

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        save_model(place / "model")
        options: dict[str, Any] = {
            "budget": "8%", "samples": 2, "length": 32, "device": "cpu", "cache": place / "cache"
        }  # fmt: skip
        # By values that were chosen otherwise it would compute another function than what is loaded.
        made = quantize(place / "model", place / "out", rounding="nearest", **options)
        expected = made.decision.kept | {"lm_head"}
        if not 1 < len(expected) < 7 * LAYERS:
            cell.fail("selection", f"{len(expected)} modules stay in 16 bits, which shows nothing")
        written = AutoModelForCausalLM.from_pretrained(place / "out", device_map="cpu").eval()
        config = dynamic_config(place / "model", **options)
        loaded = AutoModelForCausalLM.from_pretrained(
            place / "model", quantization_config=config, device_map="cpu"
        ).eval()
        for model, what in ((written, "from disk"), (loaded, "on the fly")):
            wrong = sorted(kept_in(model) ^ expected)
            if wrong:
                cell.fail("skip list", f"{wrong[0]} and {len(wrong) - 1} more are not as listed {what}")
        ids = torch.arange(40)[None]
        with torch.no_grad():
            if not written(input_ids=ids).logits.equal(loaded(input_ids=ids).logits):
                cell.fail("save and reload", "what was written computes another function than what is loaded")

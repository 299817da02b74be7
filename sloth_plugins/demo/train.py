"""Fine-tune a causal language model on instruction and response pairs: Trainer, PEFT LoRA, optionally QLoRA.

An ordinary training script. Run it with `accelerate launch train.py --model DIR --data pairs.jsonl --output run.json`.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100  # the label that the loss leaves out


class StepClock(TrainerCallback):  # type: ignore[misc]  # transformers is not type-checked here
    """Keeps the seconds of every optimizer step and prints one line a step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the step's clock."""
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it, once the device has finished what it was given."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        if state.is_world_process_zero:
            print(f"step {state.global_step}/{state.max_steps}", flush=True)


def encode(tokenizer: Any, pair: dict[str, str], max_length: int) -> dict[str, list[int]] | None:
    """Token ids and labels of one pair; only the response is learned. None if no response token fits `max_length`."""
    question = [{"role": "user", "content": pair["instruction"]}]
    answer = [{"role": "assistant", "content": pair["response"]}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(question + answer, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    response_ids = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
    if len(prompt_ids) >= max_length:
        return None
    ids = (prompt_ids + response_ids)[:max_length]
    labels = ([IGNORED] * len(prompt_ids) + response_ids)[:max_length]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def load_model(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """The base model, in 4 bits if asked, with LoRA on its seven projections."""
    device = {"": PartialState().process_index if torch.cuda.is_available() else "cpu"}
    if options.qlora:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=dtype, quantization_config=quantization, device_map=device
        )
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=options.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        if options.gradient_checkpointing:
            model.enable_input_require_grads()
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def peak_memory() -> dict[str, str | float | None]:
    """Peak memory in MiB and what was measured: the GPU's allocator, or the process where there is no GPU."""
    if torch.cuda.is_available():
        return {"what": "CUDA memory allocated", "mib": torch.cuda.max_memory_allocated() / 2**20}
    try:
        import resource
        import sys
    except ImportError:
        return {"what": "not measured on this system", "mib": None}
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return {"what": "process RSS", "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}


def parse_options() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a saved model with its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with instruction and response")
    parser.add_argument("--output", type=Path, required=True, help="where losses, times and memory go, as JSON")
    parser.add_argument("--qlora", action="store_true", help="quantize the base model to 4 bits (nf4)")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--examples", type=int, help="how many pairs to train on; all by default")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train and write the results."""
    options = parse_options()
    set_seed(options.seed)
    on_gpu = torch.cuda.is_available()
    bf16 = on_gpu and torch.cuda.is_bf16_supported()
    dtype = torch.bfloat16 if bf16 else torch.float32

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    pairs = [json.loads(line) for line in options.data.read_text().splitlines()]
    encoded = (encode(tokenizer, pair, options.max_length) for pair in pairs)
    examples = list(itertools.islice((example for example in encoded if example), options.examples))
    clock = StepClock()
    checkpointing: dict[str, Any] = {}
    if options.gradient_checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=3,
            lr_scheduler_type="cosine",
            bf16=bf16,
            use_cpu=not on_gpu,
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=options.seed,
            **checkpointing,
        )
        trainer = Trainer(
            model=load_model(options, dtype),
            args=arguments,
            train_dataset=examples,
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
            callbacks=[clock],
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began

    if trainer.is_world_process_zero():
        result = {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "seconds": seconds,
            "step_seconds": clock.seconds,
            "peak_memory": peak_memory(),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "dtype": str(dtype).removeprefix("torch."),
        }
        options.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

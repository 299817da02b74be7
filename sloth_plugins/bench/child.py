"""One run of the benchmark, in a process of its own: a Trainer on random tokens, the same in every run.

`python -m sloth_plugins.bench.child` writes step times, losses and peak memory as JSON. It prints `step k/n` lines,
from which the caller draws its progress bar.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..beside import beside
from ..errors import SlothError
from ..statistics.meter import peak_bytes

SEED = 0
OUT_OF_MEMORY = "out of memory"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNING_RATE = 1e-4


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--output", type=Path, required=True)
    for name in ("seq", "batch", "lora-r", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    return parser.parse_args(arguments)


def clock(device: Any) -> Any:
    """A callback that keeps the moment of each step's end, by the device's own clock, and the most memory."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is not type-checked here
        def __init__(self) -> None:
            self.moments: list[Any] = []
            self.peak = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)  # of loading

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # An event does not wait for the device, so that steps overlap as they do without a benchmark.
            if device.type == "cuda":
                self.moments.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]  # torch's
                self.moments[-1].record()
            else:
                self.moments.append(time.perf_counter())
            self.peak = max(self.peak, peak_bytes(device))
            print(f"step {state.global_step}/{state.max_steps}", flush=True)  # noqa: T201 - the progress

        def seconds(self) -> list[float]:
            """Between the ends of steps that follow each other."""
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                return [a.elapsed_time(b) / 1e3 for a, b in zip(self.moments, self.moments[1:], strict=False)]
            return [b - a for a, b in zip(self.moments, self.moments[1:], strict=False)]

    return Clock()


def adapted(given: argparse.Namespace, dtype: str) -> Any:
    """The model on the device, with LoRA on all its projections or, with a rank of 0, trained as a whole."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from ..verification import load_model

    if given.load_in_4bit:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
        )
        place = {"": "cuda:0" if torch.cuda.is_available() else "cpu"}
        path = Path(given.model).expanduser()
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path.parent if path.is_file() else given.model,
                dtype=getattr(torch, dtype),
                quantization_config=nf4,
                device_map=place,
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise SlothError(f"--model {given.model!r} cannot be loaded in 4 bits: {reason}") from None
    else:
        model = load_model(given.model, dtype, SEED)
    if getattr(model, "is_quantized", False):
        if not given.lora_r:
            raise SlothError("a quantised model is trained by adapters alone; --lora-r 0 trains all weights")
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if not given.lora_r:
        return model
    if given.gradient_checkpointing:
        model.enable_input_require_grads()
    torch.manual_seed(SEED)
    lora = LoraConfig(r=given.lora_r, lora_alpha=given.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def unsloth(given: argparse.Namespace, dtype: str) -> Any:
    """The same by Unsloth's loader, which wants to be imported before transformers."""
    loader = import_module("unsloth").FastLanguageModel
    import torch

    model, _ = loader.from_pretrained(
        model_name=given.model,
        max_seq_length=given.seq,
        dtype=getattr(torch, dtype),
        load_in_4bit=given.load_in_4bit,
        full_finetuning=not given.lora_r,
    )
    if not given.lora_r:
        return model
    return loader.get_peft_model(
        model,
        r=given.lora_r,
        lora_alpha=given.lora_r,
        lora_dropout=0,
        bias="none",
        target_modules=PROJECTIONS,
        use_gradient_checkpointing="unsloth" if given.gradient_checkpointing else False,
        random_state=SEED,
    )


def train(given: argparse.Namespace) -> dict[str, Any]:
    """Train, and return what was measured."""
    import torch

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    dtype = "float32"
    if device.type == "cuda":
        dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    model = (unsloth if given.variant == "unsloth" else adapted)(given, dtype)
    from transformers import Trainer, TrainingArguments, default_data_collator

    generator = torch.Generator().manual_seed(SEED)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # Few rows, so that the loss falls and a wrong gradient shows.
    tokens = torch.randint(vocabulary, (2 * given.batch, given.seq), generator=generator)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    kept = clock(device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=given.batch,
            max_steps=given.steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            bf16=dtype == "bfloat16",
            fp16=dtype == "float16",
            use_cpu=device.type == "cpu",
            use_liger_kernel=given.variant == "liger",
            gradient_checkpointing=given.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if given.gradient_checkpointing else None,
            # Seldom, since the host waits for the device to log.
            logging_steps=min(5, given.steps),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        )
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator, callbacks=[kept]
        )
        trainer.train()
    return {
        "step_seconds": kept.seconds(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak_bytes": kept.peak,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": dtype,
        "versions": {name: sys.modules[name].__version__ for name in ("torch", "transformers", "peft")},
    }


def main() -> int:
    """Measure, and write the result or the reason why there is none."""
    given = options()
    try:
        result = train(given)
    except SlothError as error:
        result = {"mistake": str(error)}
    except RuntimeError as error:
        # Told by its name, so that torch is not needed here before Unsloth has been imported.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        result = {"failed": OUT_OF_MEMORY}
    with beside(given.output) as partial:
        partial.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

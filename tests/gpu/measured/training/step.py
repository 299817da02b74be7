"""One contender on one workload, in a process of its own: training steps through Trainer, timed; one JSON line.

    SLOTH_PLUGINS=1 python -m training.step sloth MODELS/llama-8b-nf4 --checkpointing on --results steps.jsonl

Contenders: hf (Trainer and PEFT), liger, trl, unsloth, and sloth, which is hf's script with the flag set by whoever
calls. Every step is waited for, so that times are those of single steps; then come `--free` steps that nobody waits for
or logs, as most of a real run is. `--lengths` trains rows of mixed lengths.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

GIB = 2**30
WARM_UP = 4
MEMORY = ("peak_gib", "planned_gib", "reserved_gib", "retries")
LORA = {
    "r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}  # fmt: skip


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("contender", choices=["hf", "liger", "trl", "unsloth", "sloth"])
    options.add_argument("model", type=Path)
    options.add_argument("--rows", type=int, default=2)
    options.add_argument("--length", type=int, default=2048)
    options.add_argument("--lengths", type=int, nargs=2, help="from, to: rows of drawn lengths, one at a time")
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--free", type=int, default=8)
    options.add_argument(
        "--checkpointing", default="on",
        help="on, off, or what the contender knows beside: unsloth, unsloth+auto (skips layers), selective, offload",
    )  # fmt: skip
    options.add_argument("--cap", type=float, help="GiB that torch may take")
    options.add_argument("--results", type=Path, required=True)
    given = options.parse_args()
    # Mixed rows are all trained once.
    given.free = 0 if given.lengths else given.free
    return given


def model_of(given: argparse.Namespace) -> Any:
    if given.contender == "unsloth":
        from unsloth import FastLanguageModel  # first, as it wants

    import torch
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(0)
    if given.cap:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(given.cap * GIB / total)
    longest = given.lengths[1] if given.lengths else given.length
    if given.contender == "unsloth":
        model, _ = FastLanguageModel.from_pretrained(
            str(given.model), max_seq_length=longest, dtype=torch.bfloat16,
            load_in_4bit=given.model.name.endswith("nf4"),
        )  # fmt: skip
        way, _, skipped = given.checkpointing.partition("+")
        more = {"checkpoint_skip_layers": skipped} if skipped else {}
        return FastLanguageModel.get_peft_model(
            model, **LORA, random_state=0, use_gradient_checkpointing={"on": True, "off": False}.get(way, way), **more
        )
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16, device_map={"": 0})
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    if given.checkpointing != "off":
        model.enable_input_require_grads()
    return model


def data_of(given: argparse.Namespace, vocabulary: int) -> list[dict[str, Any]]:
    import torch

    draw, drawn = torch.Generator().manual_seed(1), random.Random(1)
    rows = []
    for _ in range(given.rows * (given.steps if given.lengths else 4)):
        length = drawn.randint(*given.lengths) if given.lengths else given.length
        ids = torch.randint(10, vocabulary - 10, (length,), generator=draw)
        rows.append({"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)})
    return rows


def trainer_of(given: argparse.Namespace, model: Any, rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    """(the contender's trainer for `given.steps` steps, the callback that waits for each and keeps what it took)."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []
            self.planned: list[float] = []
            self.free_seconds = 0.0

        def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step <= given.steps:
                torch.cuda.synchronize()
                self.began = time.perf_counter()

        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            if state.global_step > given.steps:
                control.should_log = False
                return
            torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.began)
            if len(self.seconds) == WARM_UP - 1:
                torch.cuda.reset_peak_memory_stats()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            if given.free:
                self.free_seconds = (time.perf_counter() - self.began) / given.free

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            self.planned.append((logs or {}).get("planned_memory_gib", 0.0))
            if logs and "loss" in logs:
                self.losses.append(round(float(logs["loss"]), 5))

    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": given.rows,
        "max_steps": given.steps + given.free, "learning_rate": 2e-4, "lr_scheduler_type": "constant",
        "optim": "adamw_8bit", "bf16": True, "seed": 0,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "remove_unused_columns": False,
    }  # fmt: skip
    if given.checkpointing != "off" and given.contender != "unsloth":
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if given.contender == "liger":
        options["use_liger_kernel"] = True
    clock = Clock()
    if given.contender != "trl":
        return Trainer(model=model, args=TrainingArguments(**options), train_dataset=rows, callbacks=[clock]), clock
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    del options["remove_unused_columns"]
    if given.checkpointing == "offload":
        options["activation_offloading"] = True
    if given.checkpointing == "selective":
        options["gradient_checkpointing_kwargs"] |= {"selective": True}
    table = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows])
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**options, max_length=None), train_dataset=table, callbacks=[clock],
        processing_class=AutoTokenizer.from_pretrained(given.model),
    )  # fmt: skip
    return trainer, clock


def main() -> None:
    given = arguments()
    model = model_of(given)
    import torch

    rows = data_of(given, model.config.vocab_size)
    trainer, clock = trainer_of(given, model, rows)
    trainer.train()
    seconds, losses, planned = clock.seconds, clock.losses, clock.planned
    timed = seconds[WARM_UP:]
    tokens = given.rows * given.length if not given.lengths else None
    sizes = [given.rows * len(row["input_ids"]) for row in rows]
    record = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()},
        "model": given.model.name, "flag": os.environ.get("SLOTH_PLUGINS", ""),
        "memory": os.environ.get("SLOTH_MEMORY", ""), "step_ms": round(1e3 * statistics.median(timed), 1),
        "from_ms": round(1e3 * min(timed), 1), "to_ms": round(1e3 * max(timed), 1),
        "tokens_per_second": round(tokens / statistics.median(timed)) if tokens else round(sum(sizes) / sum(seconds)),
        "free_ms": round(1e3 * clock.free_seconds, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "planned_gib": max(planned, default=0.0), "losses": losses,
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        # How often the allocator has found no room: it then waits for the device and gives memory back.
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
    }  # fmt: skip
    with given.results.open("a") as lines:
        lines.write(json.dumps(record) + "\n")
    shown = ("contender", "model", "checkpointing", "cap", "step_ms", "from_ms", "to_ms", "free_ms", *MEMORY)
    print(*(f"{name}={record[name]}" for name in shown), "losses", *losses[:3], "...", losses[-1], flush=True)


if __name__ == "__main__":
    main()

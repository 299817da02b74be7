"""What generation and a GRPO step cost: transformers, TRL, and the decoder here. Prints a JSON line for each number.

    python tests/gpu/measured/rollouts.py MODEL... [--parts decode grpo] [--seconds 560] [--out rollouts.jsonl]

MODEL is a folder with a checkpoint and its tokenizer; its weights may be random. Each has LoRA, r=16, on all seven
projections, adapters as PEFT makes them (fp32) over the base in bf16. `decode`: tokens per second at prompts of 128
tokens, of `model.generate`, of `generate_batch` (continuous batching, its blocks counted for the batch) and of
`fast_generate`'s decoder, with the peak memory beside the model, and of a replayed step which kernels it consists of.
`grpo`: seconds and peak of a step of 8 prompts x 8 completions x 512 tokens with a reference pass, with the patches of
rollouts, of stock TRL, and of Unsloth without vLLM where it can be imported; and how long rollout, log-probabilities,
rewards and loss take within it. SLOTH_MEMORY says what the patched one may take.

Every part runs in a process of its own that is ended after `--limit` seconds; what it has printed by then counts, and
so does the line that says how it ended. Nothing is started that `--seconds` has no time for.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT, NEW = 128, 256
GROUPS, COMPLETIONS, LENGTH = 8, 8, 512
LORA = {"r": 16, "lora_alpha": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--parts", nargs="+", default=["decode", "grpo"], choices=["decode", "grpo"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--new", type=int, default=NEW)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a completion in the GRPO step")
    parser.add_argument("--steps", type=int, default=3, help="GRPO steps; the first is not counted")
    parser.add_argument("--micro", type=int, default=8, help="completions of a micro-batch in the GRPO step")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=560)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--contenders", nargs="+", default=["sloth", "stock", "unsloth"], help="of the GRPO step")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        {"decode": decode, "grpo": grpo}[args.child](args)
        return
    end = time.monotonic() + args.seconds
    for part in args.parts:
        for model in args.models:
            for contender in ("sloth",) if part == "decode" else args.contenders:
                run(args, part, model, contender, end)


def run(args, part, model, contender, end) -> None:
    left = min(args.limit, int(end - time.monotonic()))
    which = {"part": part, "model": model.name, **({"contender": contender} if part == "grpo" else {})}
    if left < 30:
        say(args, **which, error="no time left")
        return
    options = [f"--{name}={getattr(args, name)}" for name in ("new", "length", "steps", "micro")]
    command = [sys.executable, __file__, str(model), "--child", part, *options]
    command += ["--batches", *map(str, args.batches)] + (["--out", str(args.out)] if args.out else [])
    command += ["--contenders", contender]
    environment = {name: value for name, value in os.environ.items() if name != "SLOTH_PLUGINS"}
    if part == "grpo" and contender == "sloth":
        environment["SLOTH_PLUGINS"] = "1"
        which["memory"] = environment.get("SLOTH_MEMORY", "auto")
    started = time.monotonic()
    try:
        code: int | str = subprocess.run(command, env=environment, timeout=left, check=False).returncode
    except subprocess.TimeoutExpired:
        code = f"ended after {left} s"
    say(args, **which, ended=code, seconds=round(time.monotonic() - started, 1))


def say(args, **fields) -> None:
    line = json.dumps(fields)
    print(line, flush=True)
    if args.out:
        with args.out.open("a") as file:
            file.write(line + "\n")


def device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak(*, anew=False) -> float | None:
    """GiB, since it was last asked for anew."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if anew:
        torch.cuda.reset_peak_memory_stats()
    return found


def timed(function):
    """(what it gives, seconds)"""
    wait()
    started = time.perf_counter()
    found = function()
    wait()
    return found, time.perf_counter() - started


# decode


def adapted(folder):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device())
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    torch.manual_seed(0)
    config = LoraConfig(**LORA, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.01)
    return model


def decode(args) -> None:
    import torch

    folder = args.models[0]
    model, seconds = timed(lambda: adapted(folder))
    say(args, part="decode", model=folder.name, loaded=round(seconds, 1), peak_gib=peak(anew=True))
    contenders = {"sloth": sloth, "generate": stock, "continuous": continuous}
    for rows in args.batches:
        ids = torch.randint(10, model.config.vocab_size - 10, (rows, PROMPT), device=device())
        texts = {}
        for name, contender in contenders.items():
            fields = {"part": "decode", "model": folder.name, "contender": name, "rows": rows}
            # The slower ones get fewer tokens; the time of one is what is compared.
            new = args.new if name != "generate" else max(2, args.new // 2)
            try:
                before = peak(anew=True)
                generate = contender(model, ids)
                generate(8)
                if name == "sloth":
                    generate(16)
                found, seconds = timed(lambda generate=generate, new=new: generate(new))
                texts[name] = found
                speed = {"tokens_per_second": round(rows * new / seconds, 1), "ms": round(1e3 * seconds / new, 3)}
                say(args, **fields, new=new, seconds=round(seconds, 3), **speed, peak_gib=peak(), before_gib=before)
            except Exception as error:  # noqa: BLE001 - the other contenders run all the same; it is in the line
                say(args, **fields, error=f"{type(error).__name__}: {error}"[:400])
        if {"sloth", "generate"} <= texts.keys():
            say(args, part="decode", model=folder.name, rows=rows, **agreement(texts["sloth"], texts["generate"]))
        for what in (prefill, kernels):
            try:
                say(args, part="decode", model=folder.name, rows=rows, **what(model, ids))
            except Exception as error:  # noqa: BLE001 - as above
                say(args, part="decode", model=folder.name, rows=rows, error=f"{type(error).__name__}: {error}"[:400])


def options(ids, new):
    import torch

    given = {"max_new_tokens": new, "do_sample": True, "top_k": 0, "temperature": 1.0, "pad_token_id": 0}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}


def stock(model, ids):
    import torch

    from sloth_plugins import revert

    revert(model)

    def generate(new):
        torch.manual_seed(0)
        with torch.no_grad():
            return model.generate(**options(ids, new))[:, PROMPT:].tolist()

    return generate


def sloth(model, ids):
    import torch

    from sloth_plugins import patch
    from sloth_plugins.patches.generation import entry

    patch(model)

    def generate(new):
        torch.manual_seed(0)
        found = []
        decoded = entry.decode
        entry.decode = lambda *args: (found.append(decoded(*args)), found[-1])[1]
        try:
            made = entry.faster(model, model.generate)(**options(ids, new))
        finally:
            entry.decode = decoded
        if not found:
            raise RuntimeError("it was left to transformers; the log says why")
        return made[:, PROMPT:].tolist()

    return generate


def continuous(model, ids):
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from sloth_plugins import revert

    revert(model)
    prompts = ids.tolist()

    def generate(new):
        # As many blocks as the batch needs and some for what a manager keeps back, not all memory that is free.
        blocks = len(prompts) * (-(-(PROMPT + new) // 256) + 1) + 64
        settings = ContinuousBatchingConfig(block_size=256, num_blocks=blocks, max_batch_tokens=8192)
        config = GenerationConfig(max_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=-1)
        with torch.no_grad():
            found = model.generate_batch(
                prompts, generation_config=config, continuous_batching_config=settings, progress_bar=False
            )
        made = [output.generated_tokens for output in found.values()]
        if min(map(len, made)) < new:
            raise RuntimeError(f"it gave {sum(map(len, made))} tokens in {len(made)} rows")
        return made

    return generate


def agreement(ours, theirs):
    """How many tokens of a row are the same before the first that is not; random numbers are the same."""
    leading = []
    for one, other in zip(ours, theirs, strict=True):
        pairs = list(zip(one, other, strict=False))
        leading.append(next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs)))
    return {"same_leading_tokens": statistics.mean(leading), "of": min(len(ours[0]), len(theirs[0]))}


def prefill(model, ids):
    """Seconds of a call that makes one token, without and with the rows being one prompt."""
    alone, same = ids, ids[:1].expand_as(ids).contiguous()
    found = {}
    for name, prompts in (("prefill_s", alone), ("prefill_of_one_prompt_s", same)):
        generate = sloth(model, prompts)
        generate(1)
        found[name] = round(timed(lambda generate=generate: generate(1))[1], 4)
    return found


def kernels(model, ids):
    """What a replayed step consists of: milliseconds and launches of each kernel, from the difference of two calls."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    generate = sloth(model, ids)
    if not torch.cuda.is_available():
        return {"kernels": "no device"}
    totals = []
    for new in (24, 56):
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            generate(new)
            wait()
        totals.append({e.key: (e.self_device_time_total / 1e3, e.count) for e in profiler.key_averages()})
    steps = 32
    each = {
        name: ((ms - totals[0].get(name, (0, 0))[0]) / steps, (count - totals[0].get(name, (0, 0))[1]) / steps)
        for name, (ms, count) in totals[1].items()
    }
    most = sorted(each.items(), key=lambda item: -item[1][0])[:16]
    return {
        "kernels_ms": round(sum(ms for ms, _ in each.values()), 3),
        "kernels": round(sum(count for _, count in each.values()), 1),
        "longest": [[name[:90], round(ms, 3), round(count, 1)] for name, (ms, count) in most],
    }


# grpo


def given_to_trainer(args, folder):
    """The model as a contender's users give it to the trainer, with what belongs to that."""
    from peft import LoraConfig

    if args.contenders != ["unsloth"]:
        return {"model": str(folder), "peft_config": LoraConfig(**LORA, target_modules="all-linear")}, {
            "model_init_kwargs": {"dtype": "bfloat16"}
        }
    from training.step import LORA as EACH
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=2 * PROMPT + args.length, dtype=None, load_in_4bit=False, fast_inference=False
    )
    model = FastLanguageModel.get_peft_model(
        model, **LORA, target_modules=EACH["target_modules"], use_gradient_checkpointing="unsloth", random_state=0
    )
    return {"model": model}, {}


def grpo(args) -> None:
    if args.contenders == ["unsloth"]:
        import unsloth  # noqa: F401 - first, as it wants
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.extras import profiling

    folder = args.models[0]
    spent: dict[str, float] = {}
    own_enter, own_exit = profiling.ProfilingContext.__enter__, profiling.ProfilingContext.__exit__

    def enter(self):
        wait()
        return own_enter(self)

    def leave(self, *error):
        wait()
        name = self.name.rpartition(".")[2]
        name = f"{name} without a gradient" if name.startswith("_get_per") and not torch.is_grad_enabled() else name
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - self._start_time
        return own_exit(self, *error)

    profiling.ProfilingContext.__enter__, profiling.ProfilingContext.__exit__ = enter, leave

    class Steps(TrainerCallback):
        """A line for each step."""

        def on_step_begin(self, *_, **__):
            wait()
            peak(anew=True)
            spent.clear()
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            wait()
            self.seconds = time.perf_counter() - self.started
            self.peak, self.spent = peak(), {name: round(value, 3) for name, value in spent.items()}

        def on_log(self, _, state, __, logs=None, **___):
            wanted = ("loss", "reward", "kl", "completions/mean_length", "sampling/sampling_logp_difference/mean")
            if logs and "loss" in logs:
                say(
                    args, part="grpo", model=folder.name, contender=args.contenders[0], step=state.global_step,
                    seconds=round(self.seconds, 3), peak_gib=self.peak, spent=self.spent,
                    **{name: logs[name] for name in wanted if name in logs},
                )  # fmt: skip

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    draw = torch.Generator().manual_seed(0)
    texts = [
        tokenizer.decode(torch.randint(10, len(tokenizer) - 10, (PROMPT,), generator=draw)) for _ in range(GROUPS * 8)
    ]
    is_cuda = torch.cuda.is_available()
    model, more = given_to_trainer(args, folder)
    trainer = GRPOTrainer(
        **model,
        reward_funcs=lambda completions, **columns: [float(len(set(text))) for text in completions],
        args=GRPOConfig(
            output_dir=str((args.out or Path("rollouts")).with_suffix("")) + "_trainer",
            **more,
            max_steps=args.steps,
            per_device_train_batch_size=args.micro,
            gradient_accumulation_steps=GROUPS * COMPLETIONS // args.micro,
            num_generations=COMPLETIONS,
            max_completion_length=args.length,
            beta=0.04,
            bf16=True,
            use_cpu=not is_cuda,
            learning_rate=1e-5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    trainer.train()


if __name__ == "__main__":
    main()

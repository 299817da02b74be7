"""The demo from end to end: prepare a small model, fine-tune it stock and patched, compare.

Each run is the same `train.py` under `accelerate launch` in a process of its own; SLOTH_PLUGINS is all that differs.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from sloth_plugins.beside import beside
from sloth_plugins.demo.children import ChildFailed, last_lines, run_child
from sloth_plugins.demo.results import Run, plot, problems, read_run, table, write_summary

MARKER = ".sloth-plugins-demo"
FLAG = "SLOTH_PLUGINS"
TRAIN_SCRIPT = Path(__file__).with_name("train.py")
METHODS = {"LoRA": [], "QLoRA": ["--qlora"]}


def main(out: Path, force: bool = False, *, require_patches: bool = True) -> int:
    """Run the demo into `out`; returns the exit status.

    0: passed. 1: a child failed, the losses differ by more than the tolerance, or the patched runs report no patch
    (not asked for with `require_patches=False`, for trying the demo itself). 2: `out` holds something else and `force`
    is not given. 130: interrupted. `force` also makes the model anew.
    Writes model/, runs/, logs/, accelerate.json, losses.png and summary.json.
    """
    console, errors = Console(), Console(stderr=True)
    refused = refusal(out, force)
    if refused:
        errors.print(refused, style="red", markup=False, soft_wrap=True)
        return 2
    try:
        for folder in (out, out / "logs", out / "runs"):
            folder.mkdir(parents=True, exist_ok=True)
        (out / MARKER).touch()
        prepared, pairs = run_all(out, force, errors)
        return report(out, prepared, pairs, require_patches, console, errors)
    except ChildFailed as failure:
        errors.print(last_lines(failure.log), markup=False, highlight=False, soft_wrap=True)
        errors.print(str(failure), style="red", markup=False, soft_wrap=True)
        return 1
    except OSError as error:
        errors.print(f"the demo cannot go on: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        errors.print("demo interrupted; its processes are ended", soft_wrap=True)
        return 130


def refusal(out: Path, force: bool) -> str | None:
    """Why nothing may be written to `out`, if so."""
    if out.exists() and not out.is_dir():
        return f"{out} is a file; the demo needs a folder"
    if force or not out.exists() or (out / MARKER).exists() or not any(out.iterdir()):
        return None
    return f"{out} is not empty and holds no demo; name another folder, or add --force to write there all the same"


def run_all(out: Path, force: bool, console: Console) -> tuple[dict[str, Any], list[tuple[Run, Run]]]:
    """Prepare the model and make the four runs under one progress bar; returns prepared.json and the run pairs."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    stages = 1 + 2 * len(METHODS)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=stages)

        def stage(number: int, name: str, command: list[str], environment: dict[str, str], log: Path) -> None:
            bar.update(task, description=f"{name} ({number + 1} of {stages})")
            seconds = run_child(
                name, command, environment, log, lambda fraction: bar.update(task, completed=number + fraction)
            )
            bar.console.print(f"{name}: {seconds:.0f} s", highlight=False)

        command = [sys.executable, "-m", "sloth_plugins.demo.prepare", "--out", str(out)]
        stage(
            0, "prepare", [*command, *(["--force"] if force else [])], environment(False), out / "logs" / "prepare.log"
        )
        prepared: dict[str, Any] = json.loads((out / "model" / "prepared.json").read_text())

        runs: list[Run] = []
        for method, options in METHODS.items():
            for patched in (False, True):
                name = f"{method.lower()}-{'patched' if patched else 'stock'}"
                log, result = out / "logs" / f"{name}.log", out / "runs" / f"{name}.json"
                with beside(result) as output:
                    command = [*launch_command(out, prepared), *options, "--output", str(output)]
                    stage(1 + len(runs), name, command, environment(patched), log)
                runs.append(read_run(method, patched, result, log))
    return prepared, list(zip(runs[::2], runs[1::2], strict=True))


def launch_command(out: Path, prepared: dict[str, Any]) -> list[str]:
    """`accelerate launch ... train.py ...` for one process, whatever `accelerate config` was told on this machine."""
    on_cpu = prepared["key"]["device"] == "cpu"
    config = out / "accelerate.json"
    config.write_text(
        json.dumps(
            {
                "compute_environment": "LOCAL_MACHINE",
                "distributed_type": "NO",
                "mixed_precision": "no",
                "num_machines": 1,
                "num_processes": 1,
                "use_cpu": on_cpu,
            },
            indent=1,
        )
    )
    shape = prepared["key"]["shape"]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)),
        *("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *(["--cpu"] if on_cpu else []),
        str(TRAIN_SCRIPT),
        *("--model", str(out / "model"), "--data", str(out / "model" / "pairs.jsonl")),
        *("--steps", str(shape["tune_steps"]), "--batch-size", str(shape["tune_batch"])),
        *("--max-length", str(shape["sequence"]), "--learning-rate", str(shape["tune_rate"])),
        *("--examples", str(shape["tune_examples"]), "--seed", "0"),
    ]


def environment(patched: bool) -> dict[str, str]:
    """This process's environment with SLOTH_PLUGINS set or absent, offline, on one GPU at most."""
    result = {name: value for name, value in os.environ.items() if name != FLAG and not name.startswith("ACCELERATE_")}
    if patched:
        result[FLAG] = "1"
    # With several GPUs in sight and one process, Trainer would split batches over all of them.
    result["CUDA_VISIBLE_DEVICES"] = result.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    # Threads that wait by spinning make steps many times slower where other programs use the same cores.
    result.setdefault("OMP_WAIT_POLICY", "passive")
    return result | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def report(
    out: Path,
    prepared: dict[str, Any],
    pairs: list[tuple[Run, Run]],
    require_patches: bool,
    console: Console,
    errors: Console,
) -> int:
    """Write and print the comparison; returns 0 when it passed, else 1."""
    found = problems(pairs, require_patches)
    write_summary(out / "summary.json", pairs, prepared, found)
    drawn = plot(out / "losses.png", pairs)

    first = pairs[0][0]
    console.print(table(pairs, f"{first.device}, {first.dtype}: {prepared['description']}"))
    console.print(
        f"Peak memory: {first.peak_what}. {prepared['parameters']:,} parameters.", highlight=False, soft_wrap=True
    )
    if first.device == "cpu":
        console.print("On a CPU these times say nothing about the speed of the GPU kernels.")
    for _, patched in pairs:
        for line in patched.evidence:
            console.print(f"{patched.name}: {line}", markup=False, highlight=False, soft_wrap=True)
    if not drawn:
        console.print("no plot: pip install 'sloth-plugins[plots]'", markup=False, highlight=False)
    for problem in found:
        errors.print(problem, style="red", markup=False, soft_wrap=True)
    console.print(f"{'failed' if found else 'passed'}; written to {out}", highlight=False, soft_wrap=True)
    return 1 if found else 0

"""`sloth-plugins bench`: stock against patched on the user's own model and card, as a table, JSON and a picture."""

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import err, one_line, out


def bench(
    model: Annotated[str, typer.Option("--model", help="a folder, a config.json, or a hub id", show_default=False)],
    seq: Annotated[int, typer.Option("--seq", min=2, help="tokens of a row")] = 1024,
    batch: Annotated[int, typer.Option("--batch", min=1, help="rows of a step")] = 2,
    lora_r: Annotated[int, typer.Option("--lora-r", min=0, help="rank of LoRA; 0 trains all weights")] = 16,
    steps: Annotated[int, typer.Option("--steps", min=3, help="of each run; the first fifth is not counted")] = 30,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="runs of each; the fewer, the less can be told")] = 3,
    compare: Annotated[str, typer.Option("--compare", help="rivals beside: liger, unsloth, or both")] = "",
    select: Annotated[str, typer.Option("--select", help="the patches, as SLOTH_PLUGINS")] = "1",
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="quantise the base to NF4")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="in every run")] = False,
    folder: Annotated[Path, typer.Option("--out", help="where bench.json, bench.png and logs go")] = Path("bench"),
    force: Annotated[bool, typer.Option("--force", help="replace an earlier benchmark there")] = False,
) -> None:
    """Train a model stock and patched, in turns, each run in a process of its own, and compare."""
    with one_line():
        from .report import run
        from .runs import Task
        from .variants import variants

        task = Task(
            model=model,
            seq=seq,
            batch=batch,
            lora_r=lora_r,
            steps=steps,
            load_in_4bit=load_in_4bit,
            gradient_checkpointing=gradient_checkpointing,
        )
        agrees = run(task, variants(compare), rounds, select, folder, out, err, force=force)
    if not agrees:
        raise typer.Exit(1)

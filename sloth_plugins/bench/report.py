"""A benchmark from its options to what is printed and written."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..beside import beside
from ..demo.children import ChildFailed, last_lines
from ..errors import SlothError
from ..report import columns
from . import picture
from .results import as_json, table, verdict
from .runs import Measured, Task, measure

if TYPE_CHECKING:
    from rich.console import Console

JSON, PNG, LOGS = "bench.json", "bench.png", "logs"
ON_CPU = "measured on a CPU, whose speed says nothing about a card's"
NO_PLOTS = "no picture is drawn without matplotlib: pip install 'sloth-plugins[plots]'"


def run(
    task: Task,
    names: Sequence[str],
    rounds: int,
    select: str,
    folder: Path,
    out: "Console",
    err: "Console",
    *,
    force: bool = False,
) -> bool:
    """Measure, print the table, write JSON and picture into `folder`; returns whether all losses agree with stock's.

    Raises SlothError for options that cannot be run, before anything is, and where a run fails.
    """
    _check(task, select, folder, force)
    try:
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
        with err.status("starting") as status:
            measured = measure(
                task,
                names,
                rounds,
                select,
                folder / LOGS,
                lambda label, done: status.update(f"{label} ({done:.0%} of all)"),
            )
        rows = table(measured.variants, measured.dtype, task.tokens)
        out.print("\n".join([_head(task, measured, rounds), *columns(rows)]), markup=False)
        drawn = _write(task, measured, rounds, folder)
    except ChildFailed as failure:
        err.print(last_lines(failure.log), markup=False, highlight=False)
        raise SlothError(str(failure)) from None
    except OSError as error:
        raise SlothError(f"--out {folder} cannot be written: {error}") from None
    for line in (f"patched: {', '.join(measured.patches) or 'nothing was applied'}", *([] if drawn else [NO_PLOTS])):
        err.print(f"sloth-plugins: {line}", markup=False)
    if measured.device == "cpu":
        err.print(f"sloth-plugins: {ON_CPU}", markup=False)
    stock, *others = measured.variants
    return all(verdict(variant, stock, measured.dtype).agrees for variant in others if not variant.failed)


def _check(task: Task, select: str, folder: Path, force: bool) -> None:
    """Raise SlothError for what would fail only after minutes, or would overwrite something."""
    there = [folder / name for name in (JSON, PNG) if (folder / name).exists()]
    if there and not force:
        raise SlothError(f"{there[0]} is there already; name another folder by --out, or add --force to replace it")
    if folder.exists() and not folder.is_dir():
        raise SlothError(f"--out {folder} is a file; it takes a folder")
    from ..discovery import plugins
    from ..selection import check_names, parse

    selection = parse(select, "--select")
    if selection.is_off:
        raise SlothError(f"--select {select!r} selects nothing, so there is nothing to compare stock with")
    check_names(selection, plugins().catalogue())
    from ..inspection import load_config

    text = load_config(task.model).get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and task.seq > longest:
        raise SlothError(f"--seq {task.seq}: the model takes at most {longest} tokens (max_position_embeddings)")


def _head(task: Task, measured: Measured, rounds: int) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in measured.versions.items())
    what = f"LoRA r={task.lora_r}" if task.lora_r else "all weights"
    of = " on NF4" if task.load_in_4bit else ""
    again = ", gradient checkpointing" if task.gradient_checkpointing else ""
    return (
        f"{task.model} on {measured.device}: {what}{of} in {measured.dtype}{again}, {task.batch} x {task.seq} tokens, "
        f"{rounds} {'rounds' if rounds > 1 else 'round'} of {task.steps} steps\n{versions}"
    )


def _write(task: Task, measured: Measured, rounds: int, folder: Path) -> bool:
    """Write JSON and picture, each beside and renamed; returns whether there is a picture."""
    about = {
        **asdict(task),
        "rounds": rounds,
        "device": measured.device,
        "dtype": measured.dtype,
        "versions": measured.versions,
        "patches": measured.patches,
        "says_nothing_about_a_card": measured.device == "cpu",
        "variants": as_json(measured.variants, measured.dtype, task.tokens),
    }
    with beside(folder / JSON) as partial:
        partial.write_text(json.dumps(about, indent=1), encoding="utf-8")
    title = _head(task, measured, rounds).splitlines()[0]
    note = " (says nothing about a card)" if measured.device == "cpu" else ""
    return picture.draw(folder / PNG, measured.variants, title + note)

"""The command line, from list to demo. A user's mistake is one line and exit code 2."""

import os
from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .bench.command import bench
from .discovery import Plugins, plugins
from .errors import nearest
from .export.command import app as export
from .quantization.command import quantize
from .selection import VARIABLE, Selection, parse
from .statistics.command import stats
from .terminal import err, one_line, out

app = typer.Typer(
    help="Faster fine-tuning by one environment flag: SLOTH_PLUGINS=1 accelerate launch train.py",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(export, name="export")
app.command()(stats)
app.command()(bench)
app.command()(quantize)

Model = Annotated[str, typer.Option("--model", help="a folder, a config.json, or a hub id", show_default=False)]
Select = Annotated[
    str | None, typer.Option("--select", help=f"as {VARIABLE}; defaults to it, or to 1", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]

# Set aside by `main`, since importing torch would otherwise activate the patches in this process.
_flag: str | None = None


def _selection(given: str | None) -> Selection:
    return parse(_flag or "1") if given is None else parse(given, "--select")


def _say_problems(known: Plugins) -> None:
    for problem in known.problems:
        err.print(f"sloth-plugins: {problem}", markup=False)


@app.command("list")
def list_patches(as_json: Json = False) -> None:
    """Show every architecture, its patches, and what each needs."""
    from .listing import HEADER, as_json_text, entries
    from .report import columns

    known = plugins()
    if as_json:
        out.print(as_json_text(known), markup=False)
    else:
        out.print("\n".join(columns([HEADER, *(entry.row for entry in entries(known))])), markup=False)
    _say_problems(known)


@app.command()
def plan(model: Model, select: Select = None, as_json: Json = False) -> None:
    """Show what would be patched in a model here, and why not the rest. Reads only its config.json."""
    with one_line():
        from . import report
        from .inspection import dry_run

        selection = _selection(select)
        with err.status("reading the config"):
            result = dry_run(model, selection)
    out.print(report.as_json(result) if as_json else report.text(result), markup=False)
    _say_problems(plugins())


@app.command()
def doctor() -> None:
    """Print versions, devices, Triton's state and conflicts, and run every kernel against its reference."""
    from .doctor import examine_installation

    healthy = examine_installation(out)
    _say_problems(plugins())
    if not healthy or plugins().problems:
        raise typer.Exit(1)


@app.command()
def verify(
    model: Model,
    select: Select = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16")] = "auto",
    tokens: Annotated[int, typer.Option(min=2, help="sequence length of the random batch")] = 128,
    seed: Annotated[int, typer.Option(help="of the random batch")] = 0,
) -> None:
    """Compare losses and gradients of a model, patched against stock, on one random batch."""
    with one_line():
        from .verification import print_verdict, verify_model

        selection = _selection(select)
        with err.status("running the model three times: stock, patched, and in higher precision"):
            verdict = verify_model(model, selection, dtype=dtype, tokens=tokens, seed=seed)
    print_verdict(verdict, out)
    if not verdict.passed:
        raise typer.Exit(1)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="where results go")] = Path("demo-output"),
    force: Annotated[bool, typer.Option("--force", help="write into a folder that is not a demo's")] = False,
) -> None:
    """Fine-tune a small Llama with LoRA and QLoRA, stock against patched, on text made on the spot."""
    from .demo.run import main as run_demo

    raise typer.Exit(run_demo(folder, force=force))


@app.command()
def version() -> None:
    """Print the version."""
    out.print(__version__)


def main() -> None:
    """Entry point of `sloth-plugins`."""
    global _flag
    _flag = os.environ.pop(VARIABLE, None)
    from .activation import deactivate

    deactivate()
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        # Told by what it can do, since typer may carry a click of its own.
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        err.print(f"sloth-plugins: {_usage_text(usage())}", markup=False)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def _usage_text(message: str) -> str:
    """A mistake in the arguments, in one line, with the nearest command."""
    message = message.partition(" Did you mean")[0]  # of all commands, ours knows those of `export` too
    commands = [*app.registered_commands, *export.registered_commands]
    names = ["export", *(command.name or command.callback.__name__ for command in commands if command.callback)]
    words = message.split("'")
    hint = nearest(words[1], names) if message.startswith("No such command") and len(words) > 1 else ""
    script = " (a script to run ends in .py)" if message.startswith("No such command") else ""
    return f"{' '.join(message.split()).rstrip('.')}{hint}{script}; `sloth-plugins --help` shows what there is"

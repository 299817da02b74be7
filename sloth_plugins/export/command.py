"""`sloth-plugins export`: merged checkpoints, GGUF files, and both on the Hub."""

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..report import byte_size
from ..terminal import err, one_line, out
from .marking import MARK

app = typer.Typer(help="Take a trained model home: merged, as GGUF, to the Hub.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(help="a run's output folder, an adapter's, or a model's", show_default=False)]
Out = Annotated[Path, typer.Option("-o", "--out", help="the folder to write", show_default=False)]
Base = Annotated[Path | None, typer.Option("--base", help="the base model's folder, where the adapter's own has moved")]
Force = Annotated[bool, typer.Option("--force", help="replace an earlier export")]


@app.command()
def merged(
    run_dir: Run,
    folder: Out,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; the base's own by default", show_default=False)
    ] = None,
    method: Annotated[str, typer.Option(help="merged_16bit, merged_4bit or lora")] = "merged_16bit",
    base: Base = None,
    force: Force = False,
) -> None:
    """Write base and adapter as one checkpoint, which stock transformers and vLLM load. Needs no GPU."""
    with _export():
        from .merging import merge
        from .writing import staging

        try:
            merge(run_dir, folder, dtype=dtype, method=method, base=base, force=force)
        except KeyboardInterrupt:
            partial = staging(folder)
            kept = f"; the shards in {partial} are whole, and the same command goes on from there"
            err.print(f"sloth-plugins: stopped{kept if partial.is_dir() else ''}", markup=False)
            raise
    files = [path for path in folder.iterdir() if path.is_file() and path.name != MARK]
    size = sum(path.stat().st_size for path in files)
    tokenizer = "" if any(path.name.startswith("tokenizer") for path in files) else ", no tokenizer was found"
    out.print(f"{folder}: {len(files)} files, {byte_size(size)}{tokenizer}", markup=False)


@app.command()
def gguf(
    run_dir: Run,
    folder: Out,
    quant: Annotated[
        list[str], typer.Option("--quant", help="f32, f16, bf16, q8_0, q4_k_m, q5_k_m; repeated or with commas")
    ] = ["q8_0"],  # noqa: B006 - typer copies it
    base: Base = None,
    pre_tokenizer: Annotated[
        str | None, typer.Option(help="llama.cpp's name for a pre-tokenizer that is not recognised", show_default=False)
    ] = None,
    force: Force = False,
) -> None:
    """Write GGUF files for llama.cpp and a Modelfile for Ollama."""
    with _export():
        from .gguf import export

        try:
            made = export(run_dir, folder, methods=quant, base=base, pre_tokenizer=pre_tokenizer, force=force)
        except KeyboardInterrupt:
            whole = ", ".join(sorted(path.name for path in folder.glob("model-*.gguf")))
            there = f"what is in {folder} is whole ({whole})" if whole else "no file was written"
            err.print(f"sloth-plugins: stopped; {there}", markup=False)
            raise
    for file in made.files:
        out.print(f"{file}: {byte_size(file.stat().st_size)}", markup=False)
    if made.modelfile is not None:
        out.print(f"{made.modelfile}: `ollama create NAME -f {shlex.quote(str(made.modelfile))}`", markup=False)
    for note in made.notes:
        err.print(f"sloth-plugins: {note}", markup=False)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="a folder that `export` wrote", show_default=False)],
    repo: Annotated[str, typer.Argument(help="user/name on the Hub", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
) -> None:
    """Upload an export to the Hub, or the rest of it. The token is that of `hf auth login`, or HF_TOKEN."""
    with one_line():
        from .hub import push as upload

        address = upload(folder, repo, private=private or None)
    out.print(address, markup=False)


@contextmanager
def _export() -> Iterator[None]:
    # It warns at import of a kernel that exports do not use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with one_line():
        yield

"""`sloth-plugins quantize`: a 4-bit checkpoint whose costliest linear layers stay in 16 bits."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import err, one_line, out


def quantize(
    model: Annotated[str, typer.Argument(help="a 16-bit model's folder, or a hub id in the cache", show_default=False)],
    folder: Annotated[Path, typer.Option("-o", "--out", help="the folder to write", show_default=False)],
    budget: Annotated[str, typer.Option(help="room for 16 bits: 10% of the 4-bit model, or +600MiB")] = "10%",
    data: Annotated[str, typer.Option(help="a text file to calibrate on; builtin: Python's own text")] = "builtin",
    samples: Annotated[int, typer.Option(help="rows of text")] = 64,
    length: Annotated[int, typer.Option(help="tokens of a row")] = 512,
    score: Annotated[
        str, typer.Option(help="fisher, sequence, diagonal, activation, weight, relative; kl: the slow truth")
    ] = "fisher",
    rounding: Annotated[
        str | None,
        typer.Option(help="of weights: calibrated, by what layers compute of the text (default); nearest"),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option("--lora-init", help="qera, svd or loftq: an adapter that begins as what 4 bits have lost"),
    ] = None,
    rank: Annotated[int, typer.Option(help="of that adapter")] = 16,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float16; the model's own by default")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU where there is one")] = None,
    cache: Annotated[Path | None, typer.Option(help="where measurements are kept; the user's cache by default")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier export")] = False,
) -> None:
    """Write a model in 4 bits, but for the linear layers that it costs most, as measured on your text."""
    # It warns at import of a kernel that is not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with one_line():
        from .checkpoint import quantize as write
        from .report import text

        try:
            made = write(
                model,
                folder,
                budget=budget,
                data=data,
                samples=samples,
                length=length,
                score=score,
                rounding=rounding,
                init=init,
                rank=rank,
                dtype=dtype,
                device=device,
                cache=cache,
                force=force,
            )
        except KeyboardInterrupt:
            err.print("sloth-plugins: stopped; the same command goes on from there", markup=False)
            raise
    out.print(text(made.decision), markup=False)
    out.print(f"{folder}: written", markup=False)

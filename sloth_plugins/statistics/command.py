"""`sloth-plugins stats`: the table and the picture of a run, from what its Trainer has left."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import SlothError
from ..terminal import err, one_line, out


def stats(
    output_dir: Annotated[Path, typer.Argument(help="a run's output folder, or a checkpoint's", show_default=False)],
) -> None:
    """Print the statistics of a run, and draw them into its folder. Reads trainer_state.json."""
    with one_line():
        from .history import read
        from .patterns import seen_in
        from .picture import draw
        from .summary import lines

        history = read(output_dir)
        if not history.series("loss"):
            raise SlothError(
                f"{output_dir} holds a run that has logged no loss yet; logging_steps says how often it does"
            )
        out.print("\n".join(lines(history)), markup=False)
        for line in seen_in(history):
            out.print(line, markup=False)
        try:
            line = draw(history, output_dir)
        except OSError as error:
            raise SlothError(f"the picture cannot be written: {error}") from None
    err.print(f"sloth-plugins: {line}", markup=False)

"""Score and choice by layer and type, as a PNG."""

from __future__ import annotations

from pathlib import Path

from ..beside import beside
from .decision import Decision


def draw(decision: Decision, file: Path) -> None:
    """One cell for each linear layer: its colour is what 4 bits cost there, a frame says that it stays in 16.

    Raises ImportError where there is no matplotlib.
    """
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    linears = decision.measurement.linears
    kinds = list(dict.fromkeys(linear.name.split(f".{linear.layer}.", 1)[-1] for linear in linears))
    grid = np.full((len(kinds), 1 + max(linear.layer for linear in linears)), np.nan)
    frames, dots = [], []
    outliers = {linear.name for linear in decision.outliers}
    for linear in linears:
        row = kinds.index(linear.name.split(f".{linear.layer}.", 1)[-1])
        grid[row, linear.layer] = max(linear.scores[decision.score], 0)
        if linear.name in decision.kept:
            frames.append((linear.layer, row))
        if linear.name in outliers:
            dots.append((linear.layer, row))
    figure = Figure(figsize=(max(6.0, 2.5 + 0.3 * grid.shape[1]), 1.6 + 0.35 * len(kinds)), layout="constrained")
    axes = figure.add_subplot()
    positive = grid[grid > 0]
    norm = LogNorm(positive.min(), positive.max()) if positive.size and positive.min() < positive.max() else None
    image = axes.imshow(np.where(grid > 0, grid, np.nan), aspect="auto", cmap="viridis", norm=norm)
    for column, row in frames:
        axes.add_patch(Rectangle((column - 0.45, row - 0.45), 0.9, 0.9, fill=False, edgecolor="red", linewidth=2))
    if dots:
        axes.scatter([x for x, _ in dots], [y for _, y in dots], s=12, color="white", edgecolors="black")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("decoder layer")
    axes.set_title("red: stays in 16 bits; dot: massive inputs", fontsize=10)
    unit = "nats a token" if decision.in_nats else "score"
    figure.colorbar(image, label=f"{decision.score}, {unit}")
    with beside(file) as partial:
        figure.savefig(partial, dpi=150, format="png")

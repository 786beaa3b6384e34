"""Figures of the benchmarks: one look, written to docs/figures/."""

import pathlib
from collections.abc import Sequence
from typing import Any

FIGURES = pathlib.Path(__file__).resolve().parent.parent / "docs" / "figures"


def new_figure(num_axes: int = 1) -> tuple[Any, list[Any]]:
    """A matplotlib figure and its axes, side by side. matplotlib is loaded here, so that --help needs none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, num_axes, figsize=(6.0 * num_axes, 3.8), squeeze=False, layout="constrained")
    for ax in axes[0]:
        ax.grid(visible=True, alpha=0.3)
        ax.set_axisbelow(True)
    return figure, list(axes[0])


def label(ax: Any, title: str, x_label: str, y_label: str) -> None:
    """Title and axis labels, units included."""
    ax.set_title(title)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)


def log2_ticks(ax: Any, values: Sequence[int]) -> None:
    """An x axis of powers of two that shows the numbers measured."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(values, labels=[str(value) for value in values])


def save(figure: Any, name: str, *, quick: bool) -> None:
    """Writes docs/figures/<name>.png; a quick run's figure goes to bench/results/ instead, where git ignores it."""
    folder = FIGURES if not quick else pathlib.Path(__file__).resolve().parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=120)
    print(f"wrote {(folder / name).relative_to(FIGURES.parent.parent)}.png")

"""A recorded run as a picture: above, what each request did in each step; below, who held which block after it.

Colours are the requests'. A prompt's tokens are dark (the darker, the more of the largest chunk), decodes light, time
in the queue grey; a diamond marks a prompt whose begin came from the cache, a cross a preemption. Blocks that several
requests share are black.
"""

import os
from typing import Any

from folovllm.common.errors import ConfigError
from folovllm.frontend.trace_view import TraceView

_WAITING = (0.88, 0.88, 0.88)
_IDLE = (0.97, 0.97, 0.97)
_SHARED = (0.1, 0.1, 0.1)
_NOBODY = (1.0, 1.0, 1.0)
_COLUMN_INCHES = 0.09
_ROW_INCHES = 0.22
_BLOCK_INCHES = 0.05
_MARGIN_INCHES = 2.2
_MOST_INCHES = 40.0

_Colour = tuple[float, float, float]


def save_picture(view: TraceView, path: str | os.PathLike[str]) -> None:
    """Draws the view into a file; its ending says which kind (.png, .svg, .pdf).

    Raises:
        ConfigError: matplotlib is not installed, there is nothing to draw, or the file cannot be written.
    """
    pyplot = _pyplot()
    if not (view.columns and view.rows):
        raise ConfigError("nothing to draw: no such step, or no such request in these steps")
    num_blocks = max((max(table, default=0) for column in view.columns for table in column.tables.values()), default=1)
    heights = [max(_ROW_INCHES * len(view.rows), 1.0), min(max(_BLOCK_INCHES * num_blocks, 1.0), 8.0)]
    size = (
        min(_MARGIN_INCHES + max(_COLUMN_INCHES * len(view.columns), 5.0), _MOST_INCHES),
        min(1.5 + sum(heights), _MOST_INCHES),
    )
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=size, sharex=True, height_ratios=heights, layout="constrained"
    )
    colours = {row.request: pyplot.get_cmap("tab10")(index % 10)[:3] for index, row in enumerate(view.rows)}
    extent = (view.columns[0].step_id - 0.5, view.columns[-1].step_id + 0.5)
    _draw_requests(above, view, colours, extent)
    _draw_blocks(below, view, colours, extent, num_blocks)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the picture cannot be written to {path}: {error}") from error
    finally:
        pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ConfigError("a picture needs matplotlib: pip install 'folovllm[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw_requests(axes: Any, view: TraceView, colours: dict[int, _Colour], extent: tuple[float, float]) -> None:
    largest = max((cell.num_tokens for row in view.rows for cell in row.cells.values()), default=1)
    image = [[_NOBODY] * len(view.columns) for _ in view.rows]
    for index, row in enumerate(view.rows):
        for place, column in enumerate(view.columns):
            cell = row.cells.get(column.step_id)
            if cell is None:
                continue
            image[index][place] = _cell_colour(cell.kind, cell.num_tokens / largest, colours[row.request])
            if cell.num_cached_tokens:
                axes.plot(column.step_id, index, marker="D", color="black", markersize=3)
            if cell.kind == "preempted":
                axes.plot(column.step_id, index, marker="x", color="red", markersize=6)
    axes.imshow(image, aspect="auto", interpolation="none", extent=(*extent, len(view.rows) - 0.5, -0.5))
    axes.set_yticks(range(len(view.rows)), [row.name for row in view.rows], fontsize=7)
    axes.set_ylabel("request")


def _cell_colour(kind: str, share: float, colour: _Colour) -> _Colour:
    if kind == "prompt":
        return _mixed(colour, 0.6 + 0.4 * share)
    if kind == "decode":
        return _mixed(colour, 0.3)
    return _IDLE if kind == "idle" else _WAITING


def _mixed(colour: _Colour, share: float) -> _Colour:
    """The colour on white."""
    red, green, blue = (1.0 - share * (1.0 - part) for part in colour)
    return (red, green, blue)


def _draw_blocks(
    axes: Any, view: TraceView, colours: dict[int, _Colour], extent: tuple[float, float], num_blocks: int
) -> None:
    image = [[_NOBODY] * len(view.columns) for _ in range(num_blocks)]
    for place, column in enumerate(view.columns):
        for request, table in column.tables.items():
            for block in table:
                line = image[block - 1]
                line[place] = _SHARED if line[place] is not _NOBODY else colours.get(request, _WAITING)
    axes.imshow(image, aspect="auto", interpolation="none", extent=(*extent, num_blocks + 0.5, 0.5))
    axes.set_xlabel("step")
    axes.set_ylabel("KV block")

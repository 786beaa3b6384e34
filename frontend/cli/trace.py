"""`folovllm trace`: what the scheduler decided, drawn from a file that an engine has recorded, or decided once more."""

import pathlib
import shutil

import click

from folovllm.frontend.cli.options import GroupedCommand, option

_SHOW_EXAMPLES = (
    "folovllm engine demo --listen ipc:///tmp/engine.sock --trace-file run.trace",
    "folovllm trace show run.trace",
    "folovllm trace show run.trace --steps 100:180 --request chat-1 --png run.png",
)
_REPLAY_EXAMPLES = ("folovllm trace replay run.trace",)
_TRACE = "Trace"
_MOST_STEPS = 400  # shown where nobody says which
_RUN_HELP = "Which run of the file, 1 is the first [the last]."


def _step_range(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> tuple[int, int | None] | None:
    """`A:B`, `A:`, `:B` or `A`: the first step, and the first that is not meant any more."""
    if value is None:
        return None
    first, colon, end = value.partition(":")
    if not all(part == "" or part.isdecimal() for part in (first, end)) or not (first or colon):
        raise click.BadParameter(f"{value!r} is no range of steps; write A:B, such as 100:180")
    if not colon:
        return int(first), int(first) + 1
    return int(first or 0), int(end) if end else None


@click.group(short_help="Shows or replays what a scheduler decided.")
def trace() -> None:
    """Shows, or makes again, the decisions that an engine's scheduler has recorded (--trace-file)."""


@trace.command(cls=GroupedCommand, examples=_SHOW_EXAMPLES, short_help="Draws a recorded run.")
@click.argument("file", type=click.Path(path_type=pathlib.Path))
@option(_TRACE, "--steps", metavar="A:B", callback=_step_range, help=f"Steps A to B - 1 [the first {_MOST_STEPS}].")
@option(_TRACE, "--request", "requests", multiple=True, help="A request's number or name; may be given several times.")
@option(_TRACE, "--run", type=click.IntRange(min=1), help=_RUN_HELP)
@option(_TRACE, "--width", type=click.IntRange(min=20), help="Characters in a line [the terminal's].")
@option(_TRACE, "--table", is_flag=True, help="A line for each step instead: tokens, blocks taken and freed, events.")
@option(_TRACE, "--png", type=click.Path(path_type=pathlib.Path), help="Draw into this file instead (matplotlib).")
def show(
    file: pathlib.Path,
    steps: tuple[int, int | None] | None,
    requests: tuple[str, ...],
    run: int | None,
    width: int | None,
    table: bool,
    png: pathlib.Path | None,
) -> None:
    """Draws the run in FILE: a line for each request, a column for each step, and the map of the KV blocks."""
    from folovllm.common.trace_file import TraceReader, read_run
    from folovllm.frontend.trace_text import draw, draw_table
    from folovllm.frontend.trace_view import build_view

    reader = TraceReader(file)
    header, records = read_run(reader, run)
    first, end = steps or (0, _MOST_STEPS)
    view = build_view(header, records, first=first, end=end, requests=requests)
    if png is None:
        click.echo(draw_table(view) if table else draw(view, width or shutil.get_terminal_size().columns))
    else:
        from folovllm.frontend.trace_plot import save_picture

        save_picture(view, png)
    if reader.problem:
        click.echo(f"Note: {reader.problem}; what comes before it is shown", err=True)
    if steps is None and view.totals.num_steps > _MOST_STEPS:
        shown = f"the first {_MOST_STEPS} of {view.totals.num_steps} steps"
        click.echo(f"Note: {shown}; --steps A:B shows others", err=True)


@trace.command(cls=GroupedCommand, examples=_REPLAY_EXAMPLES, short_help="Makes the decisions of a recorded run again.")
@click.argument("file", type=click.Path(path_type=pathlib.Path))
@option(_TRACE, "--run", type=click.IntRange(min=1), help=_RUN_HELP)
def replay(file: pathlib.Path, run: int | None) -> int:
    """Makes the decisions of the run in FILE again, without a model, and says where they come out differently.

    Exit codes: 0 the same decisions, 1 a difference, 2 a file that cannot be used.
    """
    from folovllm.common.child_process import run_module

    return run_module("folovllm.core_proc.replay", [str(file), *(() if run is None else ("--run", str(run)))])

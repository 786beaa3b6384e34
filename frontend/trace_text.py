"""A recorded run as text: steps from left to right, a line for each request, and the map of the blocks."""

import string
from collections.abc import Iterator, Sequence

from folovllm.frontend.trace_view import Cell, Column, Row, TraceView

_BARS = "▁▂▃▄▅▆▇█"  # a chunk of a prompt, by its share of the largest one shown
_CACHED = "◆"
_SIGNS = {"waiting": "·", "decode": "─", "idle": "_", "preempted": "×"}
_LETTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits
_FREE, _SHARED, _HIDDEN = "·", "+", "?"
_BLOCKS_PER_LINE = 64
_LEGEND = (
    f"{_BARS[0]}…{_BARS[-1]} prompt (height: tokens)   {_CACHED} begin of a prompt taken from the cache",
    "─ decodes   · waits   _ has a slot, no work   × preempted",
)


def draw(view: TraceView, width: int) -> str:
    """All of it, in lines of at most `width` characters (but for names and figures, which are not cut)."""
    lines = [*_head(view)]
    if view.columns and view.rows:
        lines += ["", *_LEGEND, *_grid(view, width), "", *_blocks(view)]
    elif view.totals.num_steps:
        lines += ["", "nothing to show: no such step, or no such request in these steps"]
    return "\n".join(lines)


def draw_table(view: TraceView) -> str:
    """A line for each step: what it computes, which blocks came and went, and what happened before it."""
    heads = ("step", "time s", "prompt", "decodes", "taken", "freed", "free")
    lines = ["  ".join(f"{head:>8}" for head in heads) + "  events"]
    for column in view.columns:
        figures = (
            str(column.step_id),
            f"{column.time_s:.4f}",
            str(column.num_prompt_tokens),
            str(column.num_decodes),
            str(column.num_taken_blocks),
            str(column.num_freed_blocks),
            str(column.num_free_blocks),
        )
        line = "  ".join(f"{figure:>8}" for figure in figures)
        lines.append(f"{line}  {', '.join(column.events)}".rstrip())
    return "\n".join([*_head(view), "", *lines])


def _head(view: TraceView) -> Iterator[str]:
    header, totals = view.header, view.totals
    caching = "on" if header.enable_prefix_caching else "off"
    yield (
        f"{header.model}: {header.num_blocks} blocks of {header.block_size} tokens, up to {header.max_num_seqs} "
        f"requests and {header.max_num_batched_tokens} tokens a step, {header.scheduling_policy}, "
        f"prefix cache {caching}, steps in flight: {header.pipeline_depth}"
    )
    yield (
        f"{totals.num_requests} requests, {totals.num_steps} steps in {totals.seconds:.3f} s; "
        f"{totals.num_prompt_tokens} prompt tokens, {totals.num_cached_tokens} of them cached; "
        f"{totals.num_output_tokens} generated; {totals.num_preemptions} preemptions"
    )


def _grid(view: TraceView, width: int) -> Iterator[str]:
    labels = [f"{_letter(index)} {row.name}" for index, row in enumerate(view.rows)]
    margin = max(map(len, labels)) + 1
    largest = max((cell.num_tokens for row in view.rows for cell in row.cells.values()), default=1)
    num_columns = max(width - margin, 10)
    for start in range(0, len(view.columns), num_columns):
        columns = view.columns[start : start + num_columns]
        yield ""
        first, last = columns[0], columns[-1]
        yield f"steps {first.step_id} to {last.step_id}, {last.time_s - first.time_s:.3f} s"
        yield " " * margin + _ruler(columns)
        for label, row in zip(labels, view.rows, strict=True):
            if any(column.step_id in row.cells for column in columns):
                yield (label.ljust(margin) + "".join(_sign(row, column, largest) for column in columns)).rstrip()
    yield ""
    yield from _ends(view.rows, labels, margin)


def _ends(rows: Sequence[Row], labels: Sequence[str], margin: int) -> Iterator[str]:
    for label, row in zip(labels, rows, strict=True):
        end = "runs on" if row.reason is None else f"ends by {row.reason} with {row.num_output_tokens} tokens"
        cached = f", {row.num_cached_tokens} cached" if row.num_cached_tokens else ""
        preempted = f"; preemptions: {row.num_preemptions}" if row.num_preemptions else ""
        yield f"{label.ljust(margin)}prompt of {row.num_prompt_tokens} tokens{cached}; {end}{preempted}"


def _ruler(columns: Sequence[Column]) -> str:
    """Numbers over the first column and every tenth step, each from its own column on to the right."""
    text = ""
    for place, column in enumerate(columns):
        if place == 0 or (column.step_id % 10 == 0 and len(text) < place):
            text = text.ljust(place) + str(column.step_id)
    return text


def _sign(row: Row, column: Column, largest: int) -> str:
    cell = row.cells.get(column.step_id)
    return " " if cell is None else _cell_sign(cell, largest)


def _cell_sign(cell: Cell, largest: int) -> str:
    if cell.num_cached_tokens:
        return _CACHED
    if cell.kind == "prompt":
        return _BARS[(len(_BARS) * cell.num_tokens - 1) // largest]
    return _SIGNS[cell.kind]


def _letter(index: int) -> str:
    return _LETTERS[index % len(_LETTERS)]


def _blocks(view: TraceView) -> Iterator[str]:
    """A sign for each block: the letter of who holds it; lines without a block in use are left out."""
    column = view.columns[-1]
    letters = {row.request: _letter(index) for index, row in enumerate(view.rows)}
    signs: dict[int, str] = {}
    for request, table in column.tables.items():
        for block in table:
            signs[block] = _SHARED if block in signs else letters.get(request, _HIDDEN)
    num_blocks = view.header.num_blocks
    yield (
        f"blocks after step {column.step_id}: {num_blocks - column.num_free_blocks} of {num_blocks} in use "
        f"({_SHARED} shared, {_FREE} free{f', {_HIDDEN} of a request not shown' if _HIDDEN in signs.values() else ''})"
    )
    margin = len(str(num_blocks)) + 2
    for start in range(1, num_blocks + 1, _BLOCKS_PER_LINE):
        line = [signs.get(block, _FREE) for block in range(start, min(start + _BLOCKS_PER_LINE, num_blocks + 1))]
        if any(sign != _FREE for sign in line):
            yield f"{start:>{margin}}  {''.join(line)}"

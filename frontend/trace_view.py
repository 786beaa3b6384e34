"""A recorded run, put in order for drawing: what each request did in each step, and who held which block after it.

Only the steps that are asked for are kept; the totals are those of the whole run. A step counts as made when it was
scheduled: what its result changed shows in the steps after it.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal, NamedTuple

from folovllm.common.errors import ConfigError, ProtocolError
from folovllm.common.messages.frontend_core import FinishReason
from folovllm.common.trace_file import (
    Admitted,
    Arrived,
    Ended,
    Resulted,
    Scheduled,
    Stopped,
    TraceHeader,
    TraceRecord,
    WorkerLost,
)
from folovllm.frontend import int32

Kind = Literal["waiting", "prompt", "decode", "idle", "preempted"]

_NO_STEP = -1


class Cell(NamedTuple):
    """One request in one step.

    Attributes:
        kind: waiting for a slot; computing tokens that were known; computing its newest one; having a slot and nothing
            to do; having lost its slot before this step.
        num_tokens: how many tokens it computed.
        num_cached_tokens: tokens taken over from shared blocks, where it got its slot in this step.
    """

    kind: Kind
    num_tokens: int = 0
    num_cached_tokens: int = 0


@dataclasses.dataclass
class Row:
    """One request; `cells` by step, without those before it arrived and after it ended."""

    request: int
    request_id: str
    sample_index: int
    num_prompt_tokens: int
    cells: dict[int, Cell] = dataclasses.field(default_factory=dict)
    reason: FinishReason | None = None
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    @property
    def name(self) -> str:
        """The user's name for it (else its number), and behind it which of the answers, but for the first."""
        return (self.request_id or str(self.request)) + (f"/{self.sample_index}" if self.sample_index else "")


@dataclasses.dataclass(frozen=True)
class Column:
    """One step.

    Attributes:
        step_id: its number.
        time_s: when it was scheduled, in seconds since the run's first record.
        num_prompt_tokens, num_decodes: what it computes.
        num_taken_blocks, num_freed_blocks: blocks that came into use, and that are in use no more, since the step
            before was scheduled.
        num_free_blocks: free blocks after it was scheduled.
        tables: the block tables of the running requests then.
        events: who ended, lost its slot or got one since the step before was scheduled, in words.
    """

    step_id: int
    time_s: float
    num_prompt_tokens: int
    num_decodes: int
    num_taken_blocks: int
    num_freed_blocks: int
    num_free_blocks: int
    tables: dict[int, tuple[int, ...]]
    events: list[str]


@dataclasses.dataclass
class Totals:
    """Of a whole run. Seconds are from its first record to its last."""

    num_requests: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0


@dataclasses.dataclass
class TraceView:
    """What `folovllm trace show` draws; `rows` in the order of arrival, those without a cell left out."""

    header: TraceHeader
    totals: Totals
    columns: list[Column]
    rows: list[Row]


class _Slot:
    """A slot's request and how many tokens that were known it has still to compute."""

    def __init__(self, admitted: Admitted) -> None:
        self.request = admitted.request
        self.num_left = admitted.num_tokens - admitted.num_cached_tokens


class _Builder:
    def __init__(self, first: int, end: int | None) -> None:
        self._first = first
        self._end = end
        self._slots: dict[int, _Slot] = {}
        self._slot_ids: list[int] = []
        self._slot_of: dict[int, int] = {}
        self._live: dict[int, Row] = {}
        self._preempted: list[int] = []
        self._begun_s: float | None = None
        self._held: set[int] = set()
        self._events: list[str] = []
        self.tables: dict[int, tuple[int, ...]] = {}
        self.rows: dict[int, Row] = {}
        self.columns: list[Column] = []
        self.totals = Totals()

    def take(self, record: TraceRecord) -> None:
        match record:
            case TraceHeader():
                return
            case Arrived():
                self._arrive(record)
            case Scheduled():
                self._schedule(record)
            case Resulted() | Stopped():
                self._leave(record.ended)
            case WorkerLost():
                self._events.append("the worker ended; another one computes anew what it held")
                self._preempt(record.preempted)
        self._begun_s = record.time_s if self._begun_s is None else self._begun_s
        self.totals.seconds = record.time_s - self._begun_s

    def _arrive(self, record: Arrived) -> None:
        parent = None if record.parent is None else self.rows.get(record.parent)
        num_prompt = len(record.prompt_token_ids) // 4 if parent is None else parent.num_prompt_tokens
        row = Row(record.request, record.request_id, record.sample_index, num_prompt)
        self.rows[row.request] = self._live[row.request] = row
        self.totals.num_requests += 1

    def _schedule(self, record: Scheduled) -> None:
        self._preempt(record.preempted)
        if record.step_id == _NO_STEP:
            return
        for admitted in record.admitted:
            self._admit(admitted)
        for slot, block in zip(int32.unpack(record.append_slots), int32.unpack(record.append_block_ids), strict=True):
            self.tables[self._slots[slot].request] += (block,)
        self._slot_ids = self._slot_ids if record.slots is None else int32.unpack(record.slots)
        longer = int32.unpack(record.num_scheduled_tokens)
        counts = [1] * (len(self._slot_ids) - len(longer)) + longer
        cells = {}
        for slot, count in zip(self._slot_ids, counts, strict=True):
            cells[self._slots[slot].request] = self._compute(self._slots[slot], count)
        self.totals.num_steps += 1
        if self._first - 1 <= record.step_id and (self._end is None or record.step_id < self._end):
            self._keep(record, cells)
        self._preempted.clear()
        self._events = []

    def _preempt(self, requests: Iterable[int]) -> None:
        for request in requests:
            self._leave_slot(request)
            self._preempted.append(request)
            self.rows[request].num_preemptions += 1
            self._events.append(f"{self.rows[request].name} preempted")
            self.totals.num_preemptions += 1

    def _admit(self, admitted: Admitted) -> None:
        row = self.rows[admitted.request]
        self._slots[admitted.slot] = _Slot(admitted)
        self._slot_of[admitted.request] = admitted.slot
        self.tables[admitted.request] = tuple(int32.unpack(admitted.block_ids))
        cached = f" ({admitted.num_cached_tokens} tokens taken over)" if admitted.num_cached_tokens else ""
        self._events.append(f"{row.name} got a slot{cached}")
        if not row.num_preemptions:  # the first time
            row.num_cached_tokens = admitted.num_cached_tokens
            self.totals.num_prompt_tokens += row.num_prompt_tokens
            self.totals.num_cached_tokens += admitted.num_cached_tokens

    def _compute(self, slot: _Slot, count: int) -> Cell:
        if slot.num_left <= 0:
            return Cell("decode", count)
        slot.num_left -= count
        return Cell("prompt", count)

    def _keep(self, record: Scheduled, cells: dict[int, Cell]) -> None:
        """Adds a column; the step before the first one that is kept only says which blocks were held then."""
        step = record.step_id
        before, self._held = self._held, {block for table in self.tables.values() for block in table}
        if step < self._first:
            return
        for admitted in record.admitted:
            cells[admitted.request] = cells[admitted.request]._replace(num_cached_tokens=admitted.num_cached_tokens)
        for request, row in self._live.items():
            resting = Cell("idle" if request in self._slot_of else "waiting")
            row.cells[step] = cells.get(request, Cell("preempted") if request in self._preempted else resting)
        num_decodes = sum(cell.kind == "decode" for cell in cells.values())
        self.columns.append(
            Column(
                step_id=step,
                time_s=record.time_s - (record.time_s if self._begun_s is None else self._begun_s),
                num_prompt_tokens=sum(cell.num_tokens for cell in cells.values()) - num_decodes,
                num_decodes=num_decodes,
                num_taken_blocks=len(self._held - before),
                num_freed_blocks=len(before - self._held),
                num_free_blocks=record.num_free_blocks,
                tables=dict(self.tables),
                events=self._events,
            )
        )

    def _leave(self, ended: Iterable[Ended]) -> None:
        for end in ended:
            self._leave_slot(end.request)
            row = self._live.pop(end.request)
            row.reason, row.num_output_tokens = end.reason, end.num_output_tokens
            self._events.append(f"{row.name} ended ({end.reason})")
            self.totals.num_output_tokens += end.num_output_tokens

    def _leave_slot(self, request: int) -> None:
        self._slot_of.pop(request, None)
        self.tables.pop(request, None)


def build_view(
    header: TraceHeader,
    records: Iterable[TraceRecord],
    *,
    first: int = 0,
    end: int | None = None,
    requests: Iterable[str] = (),
) -> TraceView:
    """Puts a run in order.

    Args:
        header: the run's.
        records: what follows it.
        first: first step that is kept.
        end: first step that is not kept any more; None keeps all.
        requests: numbers or names of the requests that are kept; none keeps all.

    Raises:
        ConfigError: the records contradict each other.
    """
    builder = _Builder(first, end)
    for record in records:
        try:
            builder.take(record)
        except (KeyError, ValueError, ProtocolError) as error:
            raise ConfigError(f"the trace contradicts itself: {type(error).__name__}: {error}, in {record}") from error
    wanted = set(requests)
    rows = [
        row
        for row in builder.rows.values()
        if row.cells and (not wanted or str(row.request) in wanted or row.request_id in wanted)
    ]
    return TraceView(header, builder.totals, builder.columns, rows)

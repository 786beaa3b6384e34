"""Log probabilities on their way from a step's result to the frontends that asked for them.

The worker names rows of its step. On the way some of them go: rows of requests that have ended, or have lost the slot
since, and parts of a prompt that were reported before the request was preempted. What is left is named by rows of the
tokens that are reported, first of all frontends, then of each.

A place is one token with its entries; places lie one behind the other, so that choosing some of them is choosing their
entries by a mask. Nothing here costs anything in a step for which nobody asked.
"""

import dataclasses
from typing import Final

import numpy as np
import numpy.typing as npt

from folovllm.common.errors import ProtocolError
from folovllm.common.messages.core_worker import Logprobs, ModelRunnerOutput, PromptLogprobs
from folovllm.common.messages.frontend_core import RequestPromptLogprobs
from folovllm.core_proc.request import Request, Tokens
from folovllm.core_proc.slot_table import Mask, Slots, SlotTable
from folovllm.core_proc.step_builder import StepInFlight

_ENTRY_BYTES: Final = 4  # of an int32 and of a float32


@dataclasses.dataclass(slots=True, frozen=True, eq=False)
class RoutedLogprobs:
    """What a step's outcome reports, for all frontends.

    Attributes:
        rows: int32, rising; indices into the outcome's tokens.
        logprobs: one place for each of `rows`; None if there is none.
        prompts: parts of prompts, each with the frontend (`client`) it is for.
    """

    rows: Tokens
    logprobs: Logprobs | None
    prompts: list[tuple[int, RequestPromptLogprobs]]


@dataclasses.dataclass(slots=True, frozen=True)
class ClientLogprobs:
    """The same for one frontend, as it stands in its message."""

    rows: bytes = b""
    logprobs: Logprobs | None = None
    prompts: list[RequestPromptLogprobs] = dataclasses.field(default_factory=list)


NO_LOGPROBS: Final = ClientLogprobs()


def check_logprobs(output: ModelRunnerOutput, num_tokens: int, step: StepInFlight, table: SlotTable) -> None:
    """Raises ProtocolError unless the result's log probabilities are whole and were asked for; changes nothing."""
    if output.logprobs is None and not output.logprob_rows and not output.prompt_logprobs:
        return
    where = f"step {output.step_id}"
    rows = _integers(f"{where}: logprob_rows", output.logprob_rows)
    if output.logprobs is None:
        if rows.size:
            raise ProtocolError(f"{where}: {rows.size} logprob_rows and no logprobs")
    elif _num_places(f"{where}: logprobs", output.logprobs) != rows.size:
        raise ProtocolError(f"{where}: logprobs for another number of tokens than its {rows.size} logprob_rows")
    if rows.size and not (rows[0] >= 0 and rows[-1] < num_tokens and (np.diff(rows) > 0).all()):
        raise ProtocolError(f"{where}: logprob_rows must rise within its {num_tokens} tokens")
    for part in output.prompt_logprobs:
        _check_prompt(f"{where}: prompt_logprobs", part, step, table)


def route_logprobs(
    output: ModelRunnerOutput, step: StepInFlight, sampled: Slots, lives: Mask, table: SlotTable
) -> RoutedLogprobs | None:
    """What of a checked result is reported; to be called before the step's tokens change anything.

    Args:
        output: the result.
        step: the step.
        sampled: the slots that sampled, in the order of the result's tokens.
        lives: which of them still have the request that they had; the others' tokens are dropped.
        table: the slots.

    Returns:
        None where there is nothing to report.
    """
    if output.logprobs is None and not output.prompt_logprobs:
        return None
    prompts = [routed for part in output.prompt_logprobs if (routed := _route_prompt(part, step, table)) is not None]
    if output.logprobs is None:
        return RoutedLogprobs(np.empty(0, np.int32), None, prompts)
    reported: Mask = lives & table.stream[sampled]
    rows, logprobs = _renamed(np.frombuffer(output.logprob_rows, "<i4"), output.logprobs, reported)
    return RoutedLogprobs(rows, logprobs, prompts)


def logprobs_for(routed: RoutedLogprobs, client: int, mine: Mask) -> ClientLogprobs:
    """One frontend's part; `mine` says which of the outcome's tokens are its own."""
    prompts = [part for owner, part in routed.prompts if owner == client]
    if routed.logprobs is None:
        return ClientLogprobs(prompts=prompts)
    rows, logprobs = _renamed(routed.rows, routed.logprobs, mine)
    return ClientLogprobs(rows.tobytes(), logprobs, prompts)


def select_places(logprobs: Logprobs, chosen: Mask) -> Logprobs:
    """Some of the places, in the same order."""
    counts = np.frombuffer(logprobs.counts, "<i4")
    entries = np.repeat(chosen, counts)
    return Logprobs(
        counts[chosen].tobytes(),
        np.frombuffer(logprobs.token_ids, "<i4")[entries].tobytes(),
        np.frombuffer(logprobs.values, "<i4")[entries].tobytes(),
        np.frombuffer(logprobs.ranks, "<i4")[chosen].tobytes(),
    )


def _renamed(rows: Tokens, logprobs: Logprobs, kept: Mask) -> tuple[Tokens, Logprobs | None]:
    """Rows among all tokens → rows among those that are `kept`, with their places."""
    if kept.all():
        return rows, logprobs if rows.size else None
    chosen: Mask = kept[rows]
    new_rows = (np.cumsum(kept) - 1)[rows[chosen]].astype(np.int32)
    if not new_rows.size:
        return new_rows, None
    return new_rows, logprobs if chosen.all() else select_places(logprobs, chosen)


def _route_prompt(
    part: PromptLogprobs, step: StepInFlight, table: SlotTable
) -> tuple[int, RequestPromptLogprobs] | None:
    request = _request_of(part, step, table)
    if request is None:
        return None
    logprobs, num_places = part.logprobs, len(part.logprobs.counts) // _ENTRY_BYTES
    num_known = request.num_prompt_logprobs - part.start  # reported before a preemption
    if num_known >= num_places:
        return None
    if num_known > 0:
        logprobs = select_places(logprobs, np.arange(num_places) >= num_known)
    start, request.num_prompt_logprobs = request.num_prompt_logprobs, part.start + num_places
    return request.client, RequestPromptLogprobs(request.number, start, logprobs)


def _request_of(part: PromptLogprobs, step: StepInFlight, table: SlotTable) -> Request | None:
    """Whose prompt it is, None if it is gone or has lost its slot since."""
    slot = int(step.slots[part.row])
    return table.request(slot) if table.epoch[slot] == step.epochs[part.row] else None


def _check_prompt(where: str, part: PromptLogprobs, step: StepInFlight, table: SlotTable) -> None:
    num_places = _num_places(where, part.logprobs)
    if not 0 <= part.row < step.slots.size:
        raise ProtocolError(f"{where}: row {part.row} is none of the step's {step.slots.size}")
    request = _request_of(part, step, table)
    if request is None:
        return
    if request.sampling.prompt_logprobs is None:
        raise ProtocolError(f"{where}: nobody asked for those of row {part.row}")
    end = part.start + num_places
    if not (1 <= part.start <= request.num_prompt_logprobs and end <= request.num_prompt_tokens):
        raise ProtocolError(
            f"{where}: tokens [{part.start}, {end}) of a prompt of {request.num_prompt_tokens}, of which those before "
            f"{request.num_prompt_logprobs} are there"
        )


def _num_places(where: str, logprobs: Logprobs) -> int:
    counts = _integers(f"{where}.counts", logprobs.counts)
    if counts.size and counts.min() < 1:
        raise ProtocolError(f"{where}: a place without an entry")
    num_entries = int(counts.sum(dtype=np.int64))
    for name, field, expected in (
        ("token_ids", logprobs.token_ids, num_entries),
        ("values", logprobs.values, num_entries),
        ("ranks", logprobs.ranks, counts.size),
    ):
        if len(field) != expected * _ENTRY_BYTES:
            raise ProtocolError(f"{where}.{name} has {len(field)} bytes for {expected} numbers")
    return counts.size


def _integers(where: str, field: bytes) -> npt.NDArray[np.int32]:
    if len(field) % _ENTRY_BYTES:
        raise ProtocolError(f"{where} has {len(field)} bytes, no array of int32")
    return np.frombuffer(field, "<i4")

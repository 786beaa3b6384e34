"""A SchedulerOutput's byte fields as arrays, checked against what the worker knows before anything is changed.

Everything that a step could break lies behind these checks: an id outside a tensor would crash the process or, on a
GPU, the device. Counting needs no tokens, so it is done on the host, in numpy, for all slots at once.
"""

import dataclasses
import math
from typing import Final

import numpy as np
import numpy.typing as npt

from folovllm.common.errors import ProtocolError
from folovllm.common.messages.core_worker import NewRequest, SamplingRow, SchedulerOutput

Ids = npt.NDArray[np.int64]

_INT32_BYTES: Final = 4
_NONE: Final = np.zeros(0, np.int64)


@dataclasses.dataclass(frozen=True, slots=True)
class StepLimits:
    """The sizes that a step must keep to.

    Attributes:
        num_slots: slots are below this.
        max_model_len: most tokens of one request.
        max_num_batched_tokens: most tokens computed in one step.
        num_blocks: block ids are below this, and not 0 (the null block).
        block_size: tokens in one block.
        vocab_size: token ids are below this.
    """

    num_slots: int
    max_model_len: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int
    vocab_size: int

    @property
    def max_blocks(self) -> int:
        """Blocks of a request of `max_model_len` tokens."""
        return -(-self.max_model_len // self.block_size)


@dataclasses.dataclass(frozen=True, slots=True)
class SlotCounts:
    """What is counted for each slot, [num_slots] each, on the host.

    Attributes:
        num_tokens: known tokens, those sampled included whose value only the device has so far.
        num_computed: tokens whose K and V are in the cache once the steps given so far are through.
        num_blocks: blocks in the block table.
    """

    num_tokens: Ids
    num_computed: Ids
    num_blocks: Ids

    @classmethod
    def empty(cls, num_slots: int) -> "SlotCounts":
        return cls(*(np.zeros(num_slots, np.int64) for _ in range(3)))

    def copy(self) -> "SlotCounts":
        return SlotCounts(self.num_tokens.copy(), self.num_computed.copy(), self.num_blocks.copy())


@dataclasses.dataclass(frozen=True, slots=True)
class NewRow:
    """A NewRequest, its byte fields as arrays."""

    slot: int
    token_ids: Ids
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: Ids
    sampling: SamplingRow
    stop_token_ids: Ids


@dataclasses.dataclass(frozen=True, slots=True)
class BlockEntries:
    """Entries of block tables to write: table[slots[i], columns[i]] = block_ids[i]."""

    slots: Ids
    columns: Ids
    block_ids: Ids


@dataclasses.dataclass(frozen=True, slots=True)
class StepArrays:
    """A checked step.

    Attributes:
        key: equal for two steps that schedule the same slots with the same token counts.
        slots: [R] slots scheduled.
        query_lens: [R] tokens of each.
        num_decodes: the first this many have one token.
        new_rows: slots filled anew.
        entries: block table entries to write: the appended blocks.
        copy_sources, copy_destinations: [n] blocks to copy.
        counts: every slot's counts once the step is applied, before it is computed.
    """

    key: tuple[bytes, bytes]
    slots: Ids
    query_lens: Ids
    num_decodes: int
    new_rows: list[NewRow]
    entries: BlockEntries
    copy_sources: Ids
    copy_destinations: Ids
    counts: SlotCounts


def read_step(step: SchedulerOutput, counts: SlotCounts, limits: StepLimits) -> StepArrays:
    """`step` as arrays. `counts` is not changed; the result shares it where the step changes no slot before computing.

    Raises:
        ProtocolError: something in the step does not fit; the message names field and value.
    """
    new_rows = [_read_new(request, limits) for request in step.new_requests]
    if new_rows or step.append_slots:
        counts = counts.copy()
    _count_new(new_rows, counts)
    entries = _read_appended(step, counts, limits)
    sources, destinations = _read_copies(step, limits)
    slots, query_lens, num_decodes = _read_scheduled(step, counts, limits)
    return StepArrays(
        (step.slots, step.num_scheduled_tokens),
        slots,
        query_lens,
        num_decodes,
        new_rows,
        entries,
        sources,
        destinations,
        counts,
    )


def _read_new(request: NewRequest, limits: StepLimits) -> NewRow:
    name = f"new request in slot {request.slot}"
    _check(0 <= request.slot < limits.num_slots, f"{name}: slots are 0 to {limits.num_slots - 1}")
    tokens = _ints(request.token_ids, f"{name}: token_ids")
    blocks = _ints(request.block_ids, f"{name}: block_ids")
    stops = _ints(request.sampling.stop_token_ids, f"{name}: stop_token_ids")
    _check(1 <= len(tokens) <= limits.max_model_len, f"{name}: {len(tokens)} tokens, not 1 to {limits.max_model_len}")
    _check_range(tokens, 0, limits.vocab_size, f"{name}: token_ids")
    _check_range(blocks, 1, limits.num_blocks, f"{name}: block_ids")
    _check(len(blocks) <= limits.max_blocks, f"{name}: {len(blocks)} blocks, at most {limits.max_blocks} are of use")
    prompt, computed = request.num_prompt_tokens, request.num_computed_tokens
    _check(1 <= prompt <= len(tokens), f"{name}: num_prompt_tokens={prompt} of {len(tokens)} tokens")
    _check(0 <= computed < len(tokens), f"{name}: num_computed_tokens={computed} of {len(tokens)} tokens")
    _check_sampling(request.sampling, name)
    # A stop id that the logits have no column for is never sampled, so there is nothing to mask either.
    stops = stops[(stops >= 0) & (stops < limits.vocab_size)]
    return NewRow(request.slot, tokens, prompt, computed, blocks, request.sampling, stops)


def _check_sampling(sampling: SamplingRow, name: str) -> None:
    temperature = sampling.temperature
    _check(temperature >= 0 and math.isfinite(temperature), f"{name}: temperature={temperature} must be finite and ≥ 0")
    _check(0 <= sampling.top_k < 2**31, f"{name}: top_k={sampling.top_k} must be ≥ 0")
    _check(0 < sampling.top_p <= 1, f"{name}: top_p={sampling.top_p} must lie in (0, 1]")
    _check(0 <= sampling.min_p <= 1, f"{name}: min_p={sampling.min_p} must lie in [0, 1]")
    _check(0 <= sampling.sample_index < 2**31, f"{name}: sample_index={sampling.sample_index} must be ≥ 0")
    _check(0 <= sampling.min_tokens < 2**31, f"{name}: min_tokens={sampling.min_tokens} must be ≥ 0")


def _count_new(new_rows: list[NewRow], counts: SlotCounts) -> None:
    slots = [row.slot for row in new_rows]
    _check(len(set(slots)) == len(slots), "new_requests: a slot occurs twice")
    for row in new_rows:
        counts.num_tokens[row.slot] = len(row.token_ids)
        counts.num_computed[row.slot] = row.num_computed_tokens
        counts.num_blocks[row.slot] = len(row.block_ids)


def _read_appended(step: SchedulerOutput, counts: SlotCounts, limits: StepLimits) -> BlockEntries:
    """The appended blocks' entries; counts them."""
    if not step.append_slots and not step.append_block_ids:
        return BlockEntries(_NONE, _NONE, _NONE)
    slots, ids = _ints(step.append_slots, "append_slots"), _ints(step.append_block_ids, "append_block_ids")
    _check(len(slots) == len(ids), f"append_slots has {len(slots)} entries, append_block_ids {len(ids)}")
    _check_range(slots, 0, limits.num_slots, "append_slots")
    _check_range(ids, 1, limits.num_blocks, "append_block_ids")
    columns = counts.num_blocks[slots] + _occurrences_before(slots)
    _check(int(columns.max()) < limits.max_blocks, f"append_slots: a slot has {limits.max_blocks} blocks already")
    np.add.at(counts.num_blocks, slots, 1)
    return BlockEntries(slots, columns, ids)


def _occurrences_before(values: Ids) -> Ids:
    """For each value, how often it occurs before its place: [7, 3, 7, 7] → [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    result = np.empty_like(values)
    result[order] = np.arange(len(values)) - starts
    return result


def _read_copies(step: SchedulerOutput, limits: StepLimits) -> tuple[Ids, Ids]:
    if not step.block_copies:
        return _NONE, _NONE
    pairs = _ints(step.block_copies, "block_copies")
    _check(len(pairs) % 2 == 0, "block_copies has an odd number of entries")
    _check_range(pairs, 1, limits.num_blocks, "block_copies")
    destinations = pairs[1::2]
    _check(len(set(destinations.tolist())) == len(destinations), "block_copies: two copies into the same block")
    return pairs[0::2], destinations


def _read_scheduled(step: SchedulerOutput, counts: SlotCounts, limits: StepLimits) -> tuple[Ids, Ids, int]:
    """Slots, token counts, and how many slots have one token."""
    slots, chunks = _ints(step.slots, "slots"), _ints(step.num_scheduled_tokens, "num_scheduled_tokens")
    _check(len(slots) > 0, "slots is empty: the step computes nothing")
    _check(len(chunks) <= len(slots), f"num_scheduled_tokens has {len(chunks)} entries, slots only {len(slots)}")
    _check_range(slots, 0, limits.num_slots, "slots")
    _check(len(set(slots.tolist())) == len(slots), "slots: a slot occurs twice")
    _check_range(chunks, 2, limits.max_num_batched_tokens + 1, "num_scheduled_tokens")
    num_decodes = len(slots) - len(chunks)
    query_lens = np.ones(len(slots), np.int64)
    query_lens[num_decodes:] = chunks
    total = num_decodes + int(chunks.sum())
    _check(total <= limits.max_num_batched_tokens, f"{total} tokens are more than {limits.max_num_batched_tokens}")
    _check_room(slots, query_lens, counts, limits)
    return slots, query_lens, num_decodes


def _check_room(slots: Ids, query_lens: Ids, counts: SlotCounts, limits: StepLimits) -> None:
    """Scheduled tokens must be known, their blocks there, and there must be room for a sampled token."""
    ends, known = counts.num_computed[slots] + query_lens, counts.num_tokens[slots]
    _check_each(slots, ends <= known, "is to compute more tokens than are known for it")
    _check_each(slots, ends <= counts.num_blocks[slots] * limits.block_size, "has too few blocks")
    _check_each(slots, (ends < known) | (known < limits.max_model_len), "has no room for one more token")


def _ints(field: bytes, name: str) -> Ids:
    if len(field) % _INT32_BYTES:
        raise ProtocolError(f"{name}: {len(field)} bytes are no whole number of int32")
    return np.frombuffer(field, "<i4").astype(np.int64)


def _check_range(values: Ids, low: int, end: int, name: str) -> None:
    if len(values) and not (low <= int(values.min()) and int(values.max()) < end):
        wrong = values[(values < low) | (values >= end)]
        raise ProtocolError(f"{name}: {int(wrong[0])} is out of range; it must be {low} to {end - 1}")


def _check_each(slots: Ids, fine: npt.NDArray[np.bool_], what: str) -> None:
    if not fine.all():
        raise ProtocolError(f"slot {int(slots[~fine][0])} {what}")


def _check(fine: bool, message: str) -> None:
    if not fine:
        raise ProtocolError(message)

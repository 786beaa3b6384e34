"""A SchedulerOutput's byte fields as arrays, checked against what the worker knows before anything is changed.

Everything that a step could break lies behind these checks: an id outside a tensor would crash the process or, on a
GPU, the device. Counting needs no tokens, so it is done on the host, in numpy, for all slots at once.
"""

import dataclasses
from typing import Final

import numpy as np
import numpy.typing as npt

from folovllm.common.messages.core_worker import NewRequest, SamplingRow, SchedulerOutput
from folovllm.worker_proc.sampling_extras import SamplingExtras, check_sampling, read_extras
from folovllm.worker_proc.wire_fields import Ids, check, check_each, check_range, ints

_WORD_BITS: Final = 32
_NONE: Final = np.zeros(0, np.int64)
_NO_MASKS: Final = np.zeros((0, 0), np.uint32)


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
        num_valid_token_ids: only ids below this are ever sampled; the logits may have more columns.
    """

    num_slots: int
    max_model_len: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int
    vocab_size: int
    num_valid_token_ids: int

    @property
    def max_blocks(self) -> int:
        """Blocks of a request of `max_model_len` tokens."""
        return -(-self.max_model_len // self.block_size)

    @property
    def mask_words(self) -> int:
        """Words of a token mask: a bit for each id that can be sampled."""
        return -(-self.num_valid_token_ids // _WORD_BITS)


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
    """A NewRequest, its byte fields as arrays; `extras` is None where it samples by its numbers alone."""

    slot: int
    token_ids: Ids
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: Ids
    sampling: SamplingRow
    stop_token_ids: Ids
    extras: SamplingExtras | None


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
        masked_slots: [m] slots of this step that sample under a token mask.
        token_masks: uint32 [m, `StepLimits.mask_words`]; bit i of word w allows token 32 · w + i.
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
    masked_slots: Ids
    token_masks: npt.NDArray[np.uint32]
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
    masked_slots, token_masks = _read_masks(step, limits)
    if len(masked_slots):
        sampling = slots[counts.num_computed[slots] + query_lens == counts.num_tokens[slots]]
        check_each(masked_slots, np.isin(masked_slots, sampling), "has a token mask and samples nothing in this step")
    return StepArrays(
        (step.slots, step.num_scheduled_tokens),
        slots,
        query_lens,
        num_decodes,
        new_rows,
        entries,
        sources,
        destinations,
        masked_slots,
        token_masks,
        counts,
    )


def _read_new(request: NewRequest, limits: StepLimits) -> NewRow:
    name = f"new request in slot {request.slot}"
    check(0 <= request.slot < limits.num_slots, f"{name}: slots are 0 to {limits.num_slots - 1}")
    tokens = ints(request.token_ids, f"{name}: token_ids")
    blocks = ints(request.block_ids, f"{name}: block_ids")
    stops = ints(request.sampling.stop_token_ids, f"{name}: stop_token_ids")
    check(1 <= len(tokens) <= limits.max_model_len, f"{name}: {len(tokens)} tokens, not 1 to {limits.max_model_len}")
    check_range(tokens, 0, limits.vocab_size, f"{name}: token_ids")
    check_range(blocks, 1, limits.num_blocks, f"{name}: block_ids")
    check(len(blocks) <= limits.max_blocks, f"{name}: {len(blocks)} blocks, at most {limits.max_blocks} are of use")
    prompt, computed = request.num_prompt_tokens, request.num_computed_tokens
    check(1 <= prompt <= len(tokens), f"{name}: num_prompt_tokens={prompt} of {len(tokens)} tokens")
    check(0 <= computed < len(tokens), f"{name}: num_computed_tokens={computed} of {len(tokens)} tokens")
    check_sampling(request.sampling, name)
    # A stop id that the logits have no column for is never sampled, so there is nothing to mask either.
    stops = stops[(stops >= 0) & (stops < limits.vocab_size)]
    extras = read_extras(request.sampling, limits.num_valid_token_ids, name)
    return NewRow(request.slot, tokens, prompt, computed, blocks, request.sampling, stops, extras)


def _count_new(new_rows: list[NewRow], counts: SlotCounts) -> None:
    slots = [row.slot for row in new_rows]
    check(len(set(slots)) == len(slots), "new_requests: a slot occurs twice")
    for row in new_rows:
        counts.num_tokens[row.slot] = len(row.token_ids)
        counts.num_computed[row.slot] = row.num_computed_tokens
        counts.num_blocks[row.slot] = len(row.block_ids)


def _read_appended(step: SchedulerOutput, counts: SlotCounts, limits: StepLimits) -> BlockEntries:
    """The appended blocks' entries; counts them."""
    if not step.append_slots and not step.append_block_ids:
        return BlockEntries(_NONE, _NONE, _NONE)
    slots, ids = ints(step.append_slots, "append_slots"), ints(step.append_block_ids, "append_block_ids")
    check(len(slots) == len(ids), f"append_slots has {len(slots)} entries, append_block_ids {len(ids)}")
    check_range(slots, 0, limits.num_slots, "append_slots")
    check_range(ids, 1, limits.num_blocks, "append_block_ids")
    columns = counts.num_blocks[slots] + _occurrences_before(slots)
    check(int(columns.max()) < limits.max_blocks, f"append_slots: a slot has {limits.max_blocks} blocks already")
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
    pairs = ints(step.block_copies, "block_copies")
    check(len(pairs) % 2 == 0, "block_copies has an odd number of entries")
    check_range(pairs, 1, limits.num_blocks, "block_copies")
    destinations = pairs[1::2]
    check(len(set(destinations.tolist())) == len(destinations), "block_copies: two copies into the same block")
    return pairs[0::2], destinations


def _read_scheduled(step: SchedulerOutput, counts: SlotCounts, limits: StepLimits) -> tuple[Ids, Ids, int]:
    """Slots, token counts, and how many slots have one token."""
    slots, chunks = ints(step.slots, "slots"), ints(step.num_scheduled_tokens, "num_scheduled_tokens")
    check(len(slots) > 0, "slots is empty: the step computes nothing")
    check(len(chunks) <= len(slots), f"num_scheduled_tokens has {len(chunks)} entries, slots only {len(slots)}")
    check_range(slots, 0, limits.num_slots, "slots")
    check(len(set(slots.tolist())) == len(slots), "slots: a slot occurs twice")
    check_range(chunks, 2, limits.max_num_batched_tokens + 1, "num_scheduled_tokens")
    num_decodes = len(slots) - len(chunks)
    query_lens = np.ones(len(slots), np.int64)
    query_lens[num_decodes:] = chunks
    total = num_decodes + int(chunks.sum())
    check(total <= limits.max_num_batched_tokens, f"{total} tokens are more than {limits.max_num_batched_tokens}")
    _check_room(slots, query_lens, counts, limits)
    return slots, query_lens, num_decodes


def _check_room(slots: Ids, query_lens: Ids, counts: SlotCounts, limits: StepLimits) -> None:
    """Scheduled tokens must be known, their blocks there, and there must be room for a sampled token."""
    ends, known = counts.num_computed[slots] + query_lens, counts.num_tokens[slots]
    check_each(slots, ends <= known, "is to compute more tokens than are known for it")
    check_each(slots, ends <= counts.num_blocks[slots] * limits.block_size, "has too few blocks")
    check_each(slots, (ends < known) | (known < limits.max_model_len), "has no room for one more token")


def _read_masks(step: SchedulerOutput, limits: StepLimits) -> tuple[Ids, npt.NDArray[np.uint32]]:
    if not step.masked_slots and not step.token_masks:
        return _NONE, _NO_MASKS
    slots = ints(step.masked_slots, "masked_slots")
    check(len(set(slots.tolist())) == len(slots), "masked_slots: a slot occurs twice")
    expected = len(slots) * limits.mask_words * _WORD_BITS // 8
    found = len(step.token_masks)
    check(found == expected, f"token_masks has {found} bytes for {len(slots)} masks, not {expected}")
    return slots, np.frombuffer(step.token_masks, "<u4").astype(np.uint32).reshape(len(slots), -1)

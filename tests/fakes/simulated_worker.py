"""A worker without a model, which does with each step what a real one does, block by block, and checks what it finds.

Its KV cache holds, for every (block, offset), the token that was written there. A token is sampled from the whole
context as read back through the block table, so a block that was shared, copied, freed or reused wrongly shows at once,
as does a slot that goes on with another request's state.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from folovllm.common.messages.core_worker import (
    ModelRunnerOutput,
    NewRequest,
    PromptLogprobs,
    SamplingRow,
    SchedulerOutput,
)
from tests.fakes.simulated_grammar import fitting, masked
from tests.fakes.simulated_logprobs import Place, pack, place, places_of

VOCABULARY = 97
VOID_TOKEN = VOCABULARY  # sampled from garbage; no answer may hold it
_GARBAGE = -1  # left by a step that failed: whoever samples from it must not live to see its result


def sample(context: Sequence[int], sampling: SamplingRow) -> int:
    """The next token: a fixed function of everything it may depend on."""
    value = sampling.seed * 31 + sampling.sample_index * 17
    for token_id in context:
        value = (value * 7 + token_id + 1) % 1_000_003
    return value % VOCABULARY


def answer(prompt: Sequence[int], sampling: SamplingRow, max_tokens: int, *, has_grammar: bool = False) -> list[int]:
    """The output of a request that runs alone, without any engine."""
    stop_ids = set(integers(sampling.stop_token_ids))
    output: list[int] = []
    while len(output) < max_tokens:
        token_id = sample([*prompt, *output], sampling)
        output.append(fitting(token_id, len(output)) if has_grammar else token_id)
        if output[-1] in stop_ids and len(output) >= sampling.min_tokens:
            break
    return output


def integers(field: bytes) -> list[int]:
    return [int(value) for value in np.frombuffer(field, "<i4")]


def int32(values: Sequence[int]) -> bytes:
    return np.array(values, "<i4").tobytes()


@dataclasses.dataclass
class Row:
    """What the worker keeps of one slot."""

    token_ids: list[int]
    num_computed: int
    block_ids: list[int]
    sampling: SamplingRow
    num_prompt: int


class SimulatedWorker:
    """Executes steps in the order given."""

    def __init__(self, block_size: int, num_blocks: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.rows: dict[int, Row] = {}
        self.kv: dict[tuple[int, int], int] = {}
        self.next_step_id = 0

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        assert step.step_id == self.next_step_id
        self.next_step_id += 1
        self._apply(step)
        counts = scheduled(step)
        prompts = [part for row, (slot, count) in enumerate(counts) for part in self._prompt_logprobs(row, slot, count)]
        sampling_slots = [slot for slot, num_tokens in counts if self._compute(slot, num_tokens)]
        masks = masks_of(step)
        assert set(masks) <= set(sampling_slots), "a mask for a slot that does not sample"
        tokens: list[int] = []
        rows: list[int] = []
        places: list[Place] = []
        for slot in sampling_slots:
            row = self.rows[slot]
            context = self._context(row)
            assert context == row.token_ids or _GARBAGE in context, "the blocks do not hold the slot's tokens"
            token_id = sample(row.token_ids, row.sampling)
            token_id = masked(token_id, masks[slot]) if slot in masks else token_id
            tokens.append(VOID_TOKEN if _GARBAGE in context else token_id)
            if row.sampling.logprobs is not None:
                rows.append(len(tokens) - 1)
                places.append(place(row.token_ids, tokens[-1], row.sampling.logprobs))
            row.token_ids.append(tokens[-1])
        return ModelRunnerOutput(
            step.step_id,
            int32(tokens),
            logprob_rows=int32(rows),
            logprobs=pack(places) if places else None,
            prompt_logprobs=prompts,
        )

    def _prompt_logprobs(self, row: int, slot: int, num_tokens: int) -> list[PromptLogprobs]:
        """Of the tokens that follow those that the step computes; to be called before they are."""
        state = self.rows[slot]
        start, end = state.num_computed + 1, min(state.num_computed + num_tokens + 1, state.num_prompt)
        if state.sampling.prompt_logprobs is None or start >= end:
            return []
        places = places_of(state.token_ids, start, end, state.sampling.prompt_logprobs)
        return [PromptLogprobs(row, start, pack(places))]

    def fail(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Counts the step as computed, as a real worker does, and leaves garbage where it would have written."""
        starts = {slot: self.rows[slot].num_computed for slot, _ in scheduled(step) if slot in self.rows}
        starts |= {new.slot: new.num_computed_tokens for new in step.new_requests}
        self.execute(step)
        for slot, num_tokens in scheduled(step):
            for position in range(starts[slot], starts[slot] + num_tokens):
                self.kv[self.rows[slot].block_ids[position // self.block_size], position % self.block_size] = _GARBAGE
        return ModelRunnerOutput(step.step_id, error="out of memory")

    def _apply(self, step: SchedulerOutput) -> None:
        for new in step.new_requests:
            self._take(new)
        for slot, block in zip(integers(step.append_slots), integers(step.append_block_ids), strict=True):
            self.rows[slot].block_ids.append(block)
        copies = np.array(integers(step.block_copies)).reshape(-1, 2).tolist()
        read = [(target, self._block(source)) for source, target in copies]
        for target, contents in read:
            self.kv.update({(target, offset): token_id for offset, token_id in contents.items()})

    def _take(self, new: NewRequest) -> None:
        assert new.num_computed_tokens < len(integers(new.token_ids)), "nothing left to compute"
        assert new.num_prompt_tokens <= len(integers(new.token_ids))
        row = Row(
            integers(new.token_ids),
            new.num_computed_tokens,
            integers(new.block_ids),
            new.sampling,
            new.num_prompt_tokens,
        )
        self.rows[new.slot] = row

    def _block(self, block: int) -> dict[int, int]:
        return {offset: self.kv[block, offset] for offset in range(self.block_size) if (block, offset) in self.kv}

    def _compute(self, slot: int, num_tokens: int) -> bool:
        row = self.rows[slot]
        end = row.num_computed + num_tokens
        assert end <= len(row.token_ids), "asked to compute tokens that are not known"
        for position in range(row.num_computed, end):
            block = row.block_ids[position // self.block_size]
            assert 0 < block < self.num_blocks
            self.kv[block, position % self.block_size] = row.token_ids[position]
        row.num_computed = end
        return end == len(row.token_ids)

    def _context(self, row: Row) -> list[int]:
        places = [divmod(position, self.block_size) for position in range(row.num_computed)]
        return [self.kv[row.block_ids[index], offset] for index, offset in places]


def masks_of(step: SchedulerOutput) -> dict[int, bytes]:
    """slot → its token mask."""
    slots, size = integers(step.masked_slots), -(-VOCABULARY // 32) * 4
    assert len(step.token_masks) == len(slots) * size
    return {slot: step.token_masks[row * size : (row + 1) * size] for row, slot in enumerate(slots)}


def scheduled(step: SchedulerOutput) -> list[tuple[int, int]]:
    """(slot, number of tokens) in the order of the step."""
    slots, longer = integers(step.slots), integers(step.num_scheduled_tokens)
    assert all(count > 1 for count in longer)
    counts = [1] * (len(slots) - len(longer)) + longer
    assert len(set(slots)) == len(slots), "a slot is scheduled twice"
    return list(zip(slots, counts, strict=True))

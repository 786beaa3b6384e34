"""What one scheduling pass has put together so far, and the token budget it has left. Lives for one pass."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from folovllm.common.messages.core_worker import NewRequest, SchedulerOutput
from folovllm.core_proc.kv_cache_manager import BlockCopy
from folovllm.core_proc.slot_table import Counts, Mask, Slots, SlotTable
from folovllm.core_proc.step_time import StepLoad


@dataclasses.dataclass(slots=True, frozen=True, eq=False)
class StepInFlight:
    """What must be remembered of a submitted step until its result comes.

    Attributes:
        step_id: echoed by the result.
        slots: the slots scheduled, in the order sent.
        epochs: each slot's epoch when it was scheduled.
        samples: which of `slots` sample a token.
        num_computed: tokens of each slot that are in the cache when the step has run.
        load: what the step has to do.
        scheduled_at_s: when it was made.
        expected_s: how long it was expected to take; 0 where nobody asked.
    """

    step_id: int
    slots: Slots
    epochs: Counts
    samples: Mask
    num_computed: Counts
    load: StepLoad
    scheduled_at_s: float
    expected_s: float


class StepBuilder:
    """Collects a step.

    Attributes:
        budget: what is left of the step's tokens.
        load: what the step has to do so far.
        num_preempted: requests that lost their slot in this pass.
    """

    def __init__(self, max_num_tokens: int) -> None:
        self.budget = max_num_tokens
        self.load = StepLoad(0, 0)
        self.num_preempted = 0
        self._decodes: Slots = np.empty(0, np.int64)
        self._others: list[tuple[int, int]] = []
        self._new_requests: list[NewRequest] = []
        self._append_slots: list[int] = []
        self._append_block_ids: list[int] = []
        self._block_copies: list[int] = []

    @property
    def is_empty(self) -> bool:
        return not self._others and not self._decodes.size

    def add_decodes(self, slots: Slots, num_context: int) -> None:
        """One token for each of `slots`, which have `num_context` tokens in the cache all together; called once."""
        self._decodes = slots
        self.budget -= slots.size
        self.load = StepLoad(slots.size, num_context)

    def add_chunk(self, slot: int, num_tokens: int, num_computed: int) -> None:
        """`num_tokens` more of a slot that has `num_computed` in the cache; the budget must have them."""
        assert 0 < num_tokens <= self.budget, f"slot {slot}: {num_tokens} tokens, budget {self.budget}"
        self._others.append((slot, num_tokens))
        self.budget -= num_tokens
        self.load = self.load.with_chunk(num_tokens, num_computed)

    def num_completed(self, table: SlotTable) -> int:
        """Slots with more than one token to compute that have none left after this step."""
        return sum(1 < table.num_known[slot] - table.num_computed[slot] <= count for slot, count in self._others)

    def has(self, slot: int) -> bool:
        """Whether the slot has a chunk in this step already."""
        return any(slot == other for other, _ in self._others)

    def add_new_request(self, new: NewRequest, copies: Sequence[BlockCopy]) -> None:
        """A slot filled anew; its tokens follow by `add_chunk`."""
        self._new_requests.append(new)
        for copy in copies:
            self._block_copies += (copy.source, copy.destination)

    def add_blocks(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        """One more block for each of `slots`."""
        self._append_slots += slots
        self._append_block_ids += block_ids

    def build(
        self, step_id: int, table: SlotTable, now_s: float, expected_s: float = 0.0
    ) -> tuple[SchedulerOutput, StepInFlight]:
        """Counts the step's tokens in the table; gives the message and what to remember."""
        ones = [slot for slot, num_tokens in self._others if num_tokens == 1]
        longer = [(slot, num_tokens) for slot, num_tokens in self._others if num_tokens > 1]
        slots, num_tokens = self._decodes, np.array([count for _, count in longer], np.int64)
        samples = table.advance(slots, 1)
        if self._others:
            others = np.array(ones + [slot for slot, _ in longer], np.int64)
            counts = np.concatenate([np.ones(len(ones), np.int64), num_tokens])
            samples = np.concatenate([samples, table.advance(others, counts)])
            slots = np.concatenate([slots, others])
        masked_slots, token_masks = table.masks(slots[samples])
        output = SchedulerOutput(
            step_id=step_id,
            slots=_bytes(slots),
            num_scheduled_tokens=_bytes(num_tokens),
            new_requests=self._new_requests,
            append_slots=_bytes(self._append_slots),
            append_block_ids=_bytes(self._append_block_ids),
            block_copies=_bytes(self._block_copies),
            masked_slots=_bytes(masked_slots),
            token_masks=token_masks,
        )
        epochs, num_computed = table.epoch[slots], table.num_computed[slots]
        return output, StepInFlight(step_id, slots, epochs, samples, num_computed, self.load, now_s, expected_s)


def _bytes(values: Slots | Sequence[int]) -> bytes:
    return np.asarray(values, "<i4").tobytes() if len(values) else b""

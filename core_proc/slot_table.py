"""The running requests' counters as arrays over slots, so that a step costs a few array operations, not a loop.

A slot is a row here and in the worker's persistent state. Slots are taken lowest first, so that those in use stay close
together, and every operation looks at the used front part only. `epoch` counts how often a slot was given up: the
result of a step that was submitted under another epoch is not for the request that has the slot now.

Output tokens stand in one matrix (slot, position in the output), written for all slots at once. Its width doubles when
an answer gets longer than it: rows are as long as the longest answer since start, not as the model's length allows, and
pages that no row has reached are never touched, so they take no memory.
"""

import heapq
from typing import Final

import numpy as np
import numpy.typing as npt

from folovllm.core_proc.request import Request, Tokens

Slots = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

STOP_COLUMNS: Final = 8  # longer stop sets are rare and looked up one by one
_FIRST_WIDTH: Final = 256
_NO_TOKEN: Final = -1


class SlotTable:
    """Rows of running requests. The counters are those of the glossary in `request.py`."""

    def __init__(self, num_slots: int, block_size: int) -> None:
        self.block_size = block_size
        self.requests: list[Request | None] = [None] * num_slots
        self.num_used = 0
        self.end = 0  # every used slot is below it
        self.used = np.zeros(num_slots, np.bool_)
        self.epoch = np.zeros(num_slots, np.int64)
        self.num_prompt = np.zeros(num_slots, np.int64)
        self.num_confirmed = np.zeros(num_slots, np.int64)
        self.num_known = np.zeros(num_slots, np.int64)
        self.num_computed = np.zeros(num_slots, np.int64)
        self.limit = np.zeros(num_slots, np.int64)
        self.capacity = np.zeros(num_slots, np.int64)  # tokens that the slot's blocks have room for
        self.num_named = np.zeros(num_slots, np.int64)  # blocks that can be found by their contents
        self.min_tokens = np.zeros(num_slots, np.int64)
        self.stream = np.zeros(num_slots, np.bool_)
        self.has_grammar = np.zeros(num_slots, np.bool_)
        self.has_mask = np.ones(num_slots, np.bool_)
        self.client = np.zeros(num_slots, np.int32)
        self.number = np.zeros(num_slots, np.int32)
        self._stop_ids = np.full((num_slots, STOP_COLUMNS), _NO_TOKEN, np.int32)
        self._long_stop_sets: dict[int, frozenset[int]] = {}
        self._num_grammars = 0  # slots with one; where there is none, a step need not look for them
        self._outputs = np.zeros((num_slots, _FIRST_WIDTH), np.int32)
        self._free = list(range(num_slots))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def running(self) -> list[Request]:
        return [request for request in self.requests[: self.end] if request is not None]

    def request(self, slot: int) -> Request:
        """The request that has `slot`, which must be in use."""
        request = self.requests[slot]
        assert request is not None, f"slot {slot} is not in use"
        return request

    def take(self, request: Request, limit: int) -> int:
        """Gives the request the lowest free slot, with everything confirmed known and nothing computed."""
        slot = heapq.heappop(self._free)
        self.end = max(self.end, slot + 1)
        self.num_used += 1
        self.requests[slot] = request
        request.slot = slot
        self.used[slot] = True
        self.num_prompt[slot] = request.num_prompt_tokens
        self.num_confirmed[slot] = self.num_known[slot] = request.num_confirmed_tokens
        self.num_computed[slot] = self.capacity[slot] = self.num_named[slot] = 0
        self.limit[slot] = limit
        self.min_tokens[slot] = request.sampling.min_tokens
        self.stream[slot] = request.stream
        self.has_grammar[slot] = request.grammar is not None
        self._num_grammars += request.grammar is not None
        self.has_mask[slot] = request.has_mask
        self.client[slot] = request.client
        self.number[slot] = request.number
        self._set_stop_ids(slot, request)
        output = request.output_token_ids
        self._widen(output.size + 1)
        self._outputs[slot, : output.size] = output
        return slot

    def release(self, request: Request) -> None:
        """Takes the slot away; the request keeps its confirmed output."""
        slot = request.slot
        assert slot is not None, request.describe()
        request.output_token_ids = self._outputs[slot, : self.num_output(slot)].copy()
        request.slot = None
        self.requests[slot] = None
        self.used[slot] = False
        self._num_grammars -= bool(self.has_grammar[slot])
        self.has_grammar[slot] = False
        self.has_mask[slot] = True
        self.epoch[slot] += 1
        self._long_stop_sets.pop(slot, None)
        self.num_used -= 1
        heapq.heappush(self._free, slot)
        while self.end and not self.used[self.end - 1]:
            self.end -= 1

    def num_output(self, slot: int) -> int:
        return int(self.num_confirmed[slot] - self.num_prompt[slot])

    def token_bytes(self, slot: int, start: int, end: int) -> bytes:
        """The confirmed tokens [start, end) of a slot's sequence, prompt and output, as int32 bytes."""
        num_prompt = int(self.num_prompt[slot])
        prompt = self.request(slot).prompt_token_ids[start : min(end, num_prompt)].tobytes()
        if end <= num_prompt:
            return prompt
        output: Tokens = self._outputs[slot, max(start - num_prompt, 0) : end - num_prompt]
        return prompt + output.tobytes()

    def grow(self, slots: Slots, num_blocks: int = 1) -> None:
        """The slots have got `num_blocks` more blocks each."""
        self.capacity[slots] += num_blocks * self.block_size
        self._widen(int((self.capacity[slots] - self.num_prompt[slots]).max()) + 1)

    def advance_grammars(self, slots: Slots, token_ids: Tokens) -> None:
        """Confirmed tokens move the grammars of their slots on; slots without one are passed over."""
        if not self._num_grammars:
            return
        rows = np.flatnonzero(self.has_grammar[slots])
        for slot, token_id in zip(slots[rows].tolist(), token_ids[rows].tolist(), strict=True):
            request = self.request(slot)
            assert request.grammar is not None, request.describe()
            request.grammar.advance(token_id)
            self.has_mask[slot] = request.has_mask

    def take_masks(self) -> None:
        """Looks which of the missing masks have come."""
        if not self._num_grammars:
            return
        for slot in np.flatnonzero(~self.has_mask[: self.end]).tolist():
            self.has_mask[slot] = self.request(slot).has_mask

    def masks(self, slots: Slots) -> tuple[Slots, bytes]:
        """Of slots that sample: those with a grammar, and their masks, one after another."""
        if not self._num_grammars:
            return slots[:0], b""
        masked = slots[self.has_grammar[slots]]
        grammars = [self.request(slot).grammar for slot in masked.tolist()]
        return masked, b"".join(grammar.mask or b"" for grammar in grammars if grammar is not None)

    def without_room(self) -> Slots:
        """Slots that may go on but whose blocks are full."""
        end = self.end
        full = self.num_computed[:end] >= self.capacity[:end]
        found: Slots = (full & self._may_go_on()).nonzero()[0]
        return found

    def ready(self) -> tuple[Slots, Slots]:
        """Slots that may go on and have room: those with one token to compute, and those with more."""
        end = self.end
        ready = self._may_go_on()
        ready &= self.num_computed[:end] < self.capacity[:end]
        single = self.num_known[:end] - self.num_computed[:end] == 1
        return (ready & single).nonzero()[0], (ready & ~single).nonzero()[0]

    def num_partial(self) -> int:
        """Slots with more than one token to compute."""
        return int(np.count_nonzero(self.num_known[: self.end] - self.num_computed[: self.end] > 1))

    def is_any_finishing(self) -> bool:
        """Whether a request only waits for tokens in flight to end at its limit."""
        end = self.end
        return bool((self.used[:end] & (self.num_known[:end] >= self.limit[:end])).any())

    def advance(self, slots: Slots, num_tokens: Counts | int) -> Mask:
        """Counts `num_tokens` more as computed, and a placeholder wherever that reaches the last known token.

        Returns:
            Which of `slots` sample.
        """
        computed = self.num_computed[slots] + num_tokens
        known = self.num_known[slots]
        samples: Mask = computed == known
        self.num_computed[slots] = computed
        self.num_known[slots] = known + samples
        return samples

    def confirm(self, slots: Slots, token_ids: Tokens) -> Counts:
        """Appends a confirmed token to each slot's output. Returns how many output tokens there are now."""
        confirmed = self.num_confirmed[slots]
        num_output = confirmed - self.num_prompt[slots]
        self._outputs[slots, num_output] = token_ids
        self.num_confirmed[slots] = confirmed + 1
        num_output += 1
        return num_output

    def stops(self, slots: Slots, token_ids: Tokens, num_output: Counts) -> Mask:
        """Which slots' tokens are in their stop set and not below their min_tokens."""
        stops: Mask = (self._stop_ids[slots] == token_ids[:, None]).any(axis=1)
        if self._long_stop_sets:
            for row, (slot, token_id) in enumerate(zip(slots.tolist(), token_ids.tolist(), strict=True)):
                stops[row] |= token_id in self._long_stop_sets.get(slot, ())
        stops &= num_output >= self.min_tokens[slots]
        return stops

    def _may_go_on(self) -> Mask:
        """A slot with a grammar waits until its last token is confirmed and the mask for the next one is filled."""
        end = self.end
        may_go_on: Mask = self.used[:end] & (self.num_known[:end] < self.limit[:end])
        if self._num_grammars:
            may_go_on &= self.has_mask[:end] & (
                ~self.has_grammar[:end] | (self.num_known[:end] == self.num_confirmed[:end])
            )
        return may_go_on

    def _set_stop_ids(self, slot: int, request: Request) -> None:
        stop_ids = np.frombuffer(request.sampling.stop_token_ids, "<i4")
        self._stop_ids[slot] = _NO_TOKEN
        if stop_ids.size <= STOP_COLUMNS:
            self._stop_ids[slot, : stop_ids.size] = stop_ids
        else:
            self._long_stop_sets[slot] = frozenset(stop_ids.tolist())

    def _widen(self, num_outputs: int) -> None:
        width = self._outputs.shape[1]
        if num_outputs <= width:
            return
        while width < num_outputs:
            width *= 2
        wider = np.zeros((len(self.requests), width), np.int32)
        wider[: self.end, : self._outputs.shape[1]] = self._outputs[: self.end]
        self._outputs = wider

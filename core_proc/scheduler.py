"""Which request computes how many tokens in the next step, and what a step's result means for each of them.

State changes through five doors only: `add_request`, `schedule`, `update_from_output`, `finish_requests`, and after the
end of a worker `lose_worker` with `run_alone`. Nothing here waits, sends or reads a clock. `check_invariants` says what
holds between two doors.

Steps may be scheduled before the results of earlier ones are known (how many is the caller's choice): `known` runs
ahead of `confirmed` by a placeholder for each token on its way. A step remembers its slots with their epochs, so that a
result never reaches a request that took the slot later, nor one that was preempted and came back.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np

from folovllm.common.errors import ProtocolError, RequestError
from folovllm.common.messages.core_worker import ModelRunnerOutput, NewRequest, SchedulerOutput
from folovllm.core_proc.isolation import Isolation, note_crash
from folovllm.core_proc.kv_cache_manager import BlockCopy, KVCacheManager
from folovllm.core_proc.logprobs_route import RoutedLogprobs, check_logprobs, route_logprobs
from folovllm.core_proc.request import Request, RequestStatus, Tokens
from folovllm.core_proc.request_queue import RequestQueue
from folovllm.core_proc.slot_table import Mask, Slots, SlotTable
from folovllm.core_proc.step_builder import StepBuilder, StepInFlight
from folovllm.core_proc.step_time import StepTimeModel

_SMALLEST_CHUNK: Final = 16  # prompts go on by so many tokens a step, whatever the target for running requests is
_MOST_OVERTAKING: Final = 16  # waiting requests that are looked at for a short one
_TOKEN_BYTES: Final = 4

NO_TOKEN_LEFT = (
    "no token could be chosen: constraints left none, a logits processor failed, or the network's numbers overflowed"
)


@dataclasses.dataclass(slots=True, frozen=True, eq=False)
class StepOutcome:
    """What a step's result brought.

    Attributes:
        clients, numbers, token_ids: int32, parallel: each new confirmed token of a streaming request, and whose it is.
        finished: requests that ended in this step; a streaming one's last token is in `token_ids` too.
        logprobs: those that belong to `token_ids` and to prompts; None if there are none.
    """

    clients: Tokens
    numbers: Tokens
    token_ids: Tokens
    finished: list[Request]
    logprobs: RoutedLogprobs | None = None


@dataclasses.dataclass(slots=True)
class SchedulerCounters:
    """Totals since start, as in EngineStats.

    Attributes:
        num_cached_tokens: prompt tokens taken from shared blocks.
        num_preemptions: preemptions.
        num_lost_tokens: tokens computed, lost by preemption and not found again in the cache.
        num_prompt_tokens: prompt tokens of all answers when they were first admitted.
        num_output_tokens: tokens confirmed.
        num_steps: steps scheduled.
        num_cache_queries: prompt tokens that were looked up in the prefix cache.
        num_cache_hits: of these, tokens that were found.
    """

    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_lost_tokens: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_steps: int = 0
    num_cache_queries: int = 0
    num_cache_hits: int = 0


@dataclasses.dataclass(slots=True, frozen=True)
class ChunkBounds:
    """How prompts are divided; None sets no bound.

    Attributes:
        long_prefill_token_threshold: most tokens of one prompt in one step.
        max_num_partial_prefills: prompts partly computed at once.
        target_itl_s: what a step with decodes may take, prompts included.
    """

    long_prefill_token_threshold: int | None = None
    max_num_partial_prefills: int | None = None
    target_itl_s: float | None = None


NO_BOUNDS: Final = ChunkBounds()


class _Prefix(NamedTuple):
    """A beginning of a sequence that need not be computed: cached blocks, or, if there is none, the parent's."""

    num_tokens: int
    block_ids: list[int]


_NO_PREFIX: Final = _Prefix(0, [])


class Scheduler:
    """One engine's requests.

    Args:
        kv_cache_manager: the blocks; block tables are kept by slot.
        queue: who waits, and the policy.
        max_num_seqs: requests running at once (slots).
        max_num_batched_tokens: tokens of one step; at least `max_num_seqs`, so that every running request gets one.
        max_model_len: longest prompt + output in tokens.
        watermark: share of the pool that admission leaves free.
        bounds: on how prompts are divided.
    """

    def __init__(
        self,
        *,
        kv_cache_manager: KVCacheManager,
        queue: RequestQueue,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        watermark: float = 0.01,
        bounds: ChunkBounds = NO_BOUNDS,
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(f"max_num_batched_tokens={max_num_batched_tokens} is below max_num_seqs={max_num_seqs}")
        self.counters = SchedulerCounters()
        self._kv = kv_cache_manager
        self._queue = queue
        self._table = SlotTable(max_num_seqs, kv_cache_manager.block_size)
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._num_watermark_blocks = math.ceil(watermark * kv_cache_manager.pool.num_usable)
        self._in_flight: collections.deque[StepInFlight] = collections.deque()
        self._max_chunk = bounds.long_prefill_token_threshold or max_num_batched_tokens
        self._max_num_partial = bounds.max_num_partial_prefills or max_num_seqs
        self._target_itl_s = bounds.target_itl_s
        self._step_times = StepTimeModel()
        self._last_result_s = -math.inf
        self._isolation = Isolation()
        self._num_parked = 0  # children that wait for their parent's prompt
        self._num_added = 0

    @property
    def num_running(self) -> int:
        return self._table.num_used

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot, preempted ones and children of an unfinished prompt included."""
        return len(self._queue) + self._num_parked

    @property
    def num_waiting_tokens(self) -> int:
        """Their prompt tokens; a child counts as one (see `Request.num_queue_tokens`)."""
        return self._queue.num_tokens + self._num_parked

    def request_in(self, slot: int) -> Request:
        """The request that has the slot, which must be in use."""
        return self._table.request(slot)

    def first_requests(self, most: int) -> list[Request]:
        """At most so many requests: those that run, by slot, then those that wait, in order. For whoever looks on."""
        running = self._table.running()[:most]
        return running + self._queue.first(most - len(running))

    def progress(self, request: Request) -> tuple[int, int]:
        """Its known and its computed tokens."""
        if request.slot is None:
            return request.num_confirmed_tokens, 0
        return int(self._table.num_known[request.slot]), int(self._table.num_computed[request.slot])

    @property
    def max_num_batched_tokens(self) -> int:
        """The token budget of a step."""
        return self._max_num_batched_tokens

    @property
    def has_unfinished(self) -> bool:
        return self.num_running > 0 or self.num_waiting > 0

    @property
    def num_tokens_in_use(self) -> int:
        """Tokens whose K and V are held in blocks; shared ones count once."""
        table = self._table
        return self._kv.num_held_tokens(int(table.num_computed[: table.end][table.used[: table.end]].sum()))

    def add_request(self, request: Request) -> None:
        """Takes a new request. Of the `n` answers to a prompt the first comes first; the others name it as `parent`.

        Raises:
            RequestError: it can never run: the prompt leaves no room for a token in the model's length or the pool.
        """
        if self._limit(request) <= request.num_prompt_tokens:
            raise RequestError(
                f"the prompt has {request.num_prompt_tokens} tokens; the model's length of {self._max_model_len} must "
                f"leave room for one more, and the KV cache holds {self._kv.capacity_tokens}",
                "prompt_token_ids",
            )
        request.arrival_order = self._num_added
        self._num_added += 1
        parent = request.parent
        if parent is not None and parent.status is RequestStatus.WAITING:
            parent.waiting_children.append(request)
            self._num_parked += 1
        else:
            self._queue.push(request)

    def schedule(self, now_s: float) -> SchedulerOutput | None:
        """The next step, or None if nothing can run before a result comes (or at all).

        There is no prefill and no decode phase. Each running request has tokens that are known and tokens that are
        computed, and every step lets the second catch up with the first, within the step's token budget:

        1. Running requests with one token to compute get it; where a new block is needed and none is free, the last in
           rank of the running requests is preempted: its slot and blocks are freed, and it goes back to the queue, to
           be computed anew from its confirmed tokens, as far as they are not cached.
        2. What is left of the budget goes to prompts (and to what was lost): as much as the target for the time between
           tokens allows, where there is one.
        3. If the first of the prompts that run will not be done in this step, up to half of that goes to later ones
           that have half as much left or less: short prompts overtake a long one, which takes twice its time at most.
        4. The rest goes to running prompts in order of rank, then, unless somebody was preempted, to waiting requests
           in the queue's order, which are admitted while there are slots, and blocks for all their known tokens with a
           reserve (the watermark) for those who run already.

        A request that reaches its limit with the tokens on their way is left alone until they arrive, and one with a
        grammar until its last token has arrived and the mask for the next one is filled. While somebody is suspected
        of having ended a worker, nobody else is admitted.
        """
        self._table.take_masks()
        step = StepBuilder(self._max_num_batched_tokens)
        self._turn_to_suspect()
        self._make_room(step)
        decodes, chunked = self._table.ready()
        step.add_decodes(decodes, int(self._table.num_computed[decodes].sum()))
        prompts = sorted(self._requests(chunked), key=self._queue.rank)
        self._limit_prefill(step, prompts)
        self._overtake(step, prompts, now_s)
        self._continue_chunks(step, prompts)
        self._admit_waiting(step, now_s)
        self._admit_suspect(step, now_s)
        if step.is_empty:
            return None
        is_sized = self._target_itl_s is not None and step.load.is_mixed
        expected_s = self._step_times.predict(step.load) if is_sized else 0.0
        output, in_flight = step.build(self.counters.num_steps, self._table, now_s, expected_s)
        self.counters.num_steps += 1
        self._in_flight.append(in_flight)
        return output

    def update_from_output(self, output: ModelRunnerOutput, now_s: float) -> StepOutcome:
        """Takes in the result of the oldest step in flight. Results for requests that are gone are dropped.

        Raises:
            ProtocolError: it is not that step's result, or does not have one token for each slot that sampled.
        """
        step, token_ids = self._match(output)
        if output.max_num_tokens:  # each running request still gets one token: the worker divides what is too large
            budget = max(output.max_num_tokens, len(self._table.requests))
            self._max_num_batched_tokens = min(self._max_num_batched_tokens, budget)
        self._learn_step_time(step, now_s)
        if output.error:
            lives = self._table.epoch[step.slots] == step.epochs
            failed = self._requests(step.slots[lives])
            return only_ends(self.finish_requests(failed, RequestStatus.FINISHED_ERROR, now_s, output.error))
        self._name_blocks(step)
        slots, epochs = step.slots, step.epochs
        if not step.samples.all():
            slots, epochs = slots[step.samples], epochs[step.samples]
        lives = self._table.epoch[slots] == epochs
        failed = []
        if output.no_token_rows:
            rows = _integers(output.no_token_rows)
            failed = self._requests(slots[rows][lives[rows]])
            lives[rows] = False
        logprobs = route_logprobs(output, step, slots, lives, self._table)
        if not lives.all():
            slots, token_ids = slots[lives], token_ids[lives]
        outcome = self._confirm(slots, token_ids, logprobs, now_s)
        outcome.finished.extend(self.finish_requests(failed, RequestStatus.FINISHED_ERROR, now_s, NO_TOKEN_LEFT))
        return outcome

    def finish_requests(
        self, requests: Iterable[Request], status: RequestStatus, now_s: float, error: str = ""
    ) -> list[Request]:
        """Ends requests from outside, wherever they are; blocks are free at once, tokens on their way are dropped.

        Returns:
            Those it ended; requests that had ended before are passed over.
        """
        ended = [request for request in requests if not request.is_finished]
        for request in ended:
            request.error = error
            self._end(request, status, now_s, error or "from outside")
        return ended

    def reset_prefix_cache(self) -> None:
        """What was computed so far is not found any more."""
        self._kv.reset_prefix_cache()

    def lose_worker(self) -> list[Request]:
        """The worker has ended, and with it the cache and the steps in flight: all is computed anew by the next one.

        Who ran goes back to the queue with the tokens that are confirmed; those on their way are sampled again, and
        are the same.

        Returns:
            Who was in the steps in flight: one of them may have ended the worker.
        """
        table = self._table
        slots = {int(slot) for step in self._in_flight for slot in step.slots[table.epoch[step.slots] == step.epochs]}
        in_flight = [table.request(slot) for slot in sorted(slots)]
        for request in in_flight:
            note_crash(request, int(table.num_confirmed[request.slot]))
        for request in table.running():
            self._preempt(request)
        self._in_flight.clear()
        self._kv.reset_prefix_cache()
        return in_flight

    def run_alone(self, suspects: Sequence[Request]) -> None:
        """Right after `lose_worker`: these run one after the other, each alone, before all others go on."""
        self._isolation.add(suspects)

    # ---- schedule ----------------------------------------------------------------------------------------------------

    def _make_room(self, step: StepBuilder) -> None:
        """A block for each running request that needs one, by preemption if it must be."""
        slots = self._table.without_room()
        if not slots.size:
            return
        block_ids = self._kv.append_blocks(slots.tolist())
        if block_ids is not None:
            self._table.grow(slots)
            step.add_blocks(slots.tolist(), block_ids)
            return
        for request in sorted(self._requests(slots), key=self._queue.rank):
            if request.slot is not None:
                self._make_room_by_preemption(request, step)

    def _make_room_by_preemption(self, request: Request, step: StepBuilder) -> None:
        """A block for one request, whoever must go for it, itself included.

        While somebody's end is on its way, so are blocks: the request sits this step out, and nobody is preempted.
        Alone it always finds a block, as no request's limit is beyond the pool.
        """
        slot = request.slot
        assert slot is not None, request.describe()
        while (block_ids := self._kv.append_blocks([slot])) is None:
            if self._table.is_any_finishing():
                return
            victim = max(self._table.running(), key=self._queue.rank)
            self._preempt(victim)
            step.num_preempted += 1
            if victim is request:
                return
        self._table.grow(np.array([slot]))
        step.add_blocks([slot], block_ids)

    def _preempt(self, request: Request) -> None:
        assert request.slot is not None, request.describe()
        num_lost = int(self._table.num_computed[request.slot])
        request.become(RequestStatus.PREEMPTED, f"step {self.counters.num_steps}, {num_lost} tokens lost")
        request.num_preemptions += 1
        self.counters.num_preemptions += 1
        self.counters.num_lost_tokens += num_lost
        self._leave_slot(request)
        self._queue.push(request)

    def _limit_prefill(self, step: StepBuilder, prompts: Sequence[Request]) -> None:
        """Cuts the budget down to what the target for the time between tokens allows; a little always goes on."""
        if self._target_itl_s is None or not step.load.num_decodes or not (prompts or len(self._queue)):
            return
        if prompts:
            num_computed = int(self._table.num_computed[prompts[0].slot])
        else:
            first = self._queue.peek()
            num_computed = 0 if first is None else self._find_prefix(first).num_tokens
        most = self._step_times.max_prefill_tokens(step.load, num_computed, self._target_itl_s, step.budget)
        step.budget = min(step.budget, max(most, _SMALLEST_CHUNK))

    def _overtake(self, step: StepBuilder, prompts: Sequence[Request], now_s: float) -> None:
        """Half of the budget goes to prompts that have half as much left as the first, or less; the shortest first."""
        if not prompts or self._num_left(prompts[0]) <= step.budget:
            return
        reserved, longest = step.budget - step.budget // 2, self._num_left(prompts[0]) // 2
        for request in sorted(prompts[1:], key=self._num_left):
            num_left = self._num_left(request)
            num_tokens = min(num_left, step.budget - reserved, self._max_chunk)
            if num_tokens and num_left <= longest:
                self._add_chunk(step, request, num_tokens)
        level = self._queue.rank(prompts[0])[0]
        for request in self._queue.first(_MOST_OVERTAKING):
            if self._queue.rank(request)[0] > level or not self._can_admit(step) or not request.has_mask:
                return
            prefix = self._find_prefix(request)
            if not self._fits(request, prefix):
                return
            num_left = request.num_confirmed_tokens - prefix.num_tokens
            num_tokens = min(num_left, step.budget - reserved, self._max_chunk)
            may_be_partial = num_tokens == num_left or self._num_partial(step) < self._max_num_partial
            if num_tokens and num_left <= longest and may_be_partial:
                self._queue.remove(request)
                self._admit(request, prefix, num_tokens, step, now_s)

    def _continue_chunks(self, step: StepBuilder, prompts: Sequence[Request]) -> None:
        for request in prompts:
            if step.budget and request.slot is not None and not step.has(request.slot):
                self._add_chunk(step, request, min(self._num_left(request), self._max_chunk, step.budget))

    def _num_left(self, request: Request) -> int:
        """Tokens of a running request that are known and not computed."""
        assert request.slot is not None, request.describe()
        return int(self._table.num_known[request.slot] - self._table.num_computed[request.slot])

    def _add_chunk(self, step: StepBuilder, request: Request, num_tokens: int) -> None:
        assert request.slot is not None, request.describe()
        step.add_chunk(request.slot, num_tokens, int(self._table.num_computed[request.slot]))

    def _admit_waiting(self, step: StepBuilder, now_s: float) -> None:
        while self._can_admit(step) and (request := self._queue.peek()) is not None and request.has_mask:
            prefix = self._find_prefix(request)
            if not self._fits(request, prefix):
                return
            num_left = request.num_confirmed_tokens - prefix.num_tokens
            num_tokens = min(num_left, self._max_chunk, step.budget)
            if num_tokens < num_left and self._num_partial(step) >= self._max_num_partial:
                return
            self._queue.pop()
            self._admit(request, prefix, num_tokens, step, now_s)

    def _turn_to_suspect(self) -> None:
        """Who is cleared makes room for the next suspect, if there is one."""
        suspect = self._isolation.first()
        if suspect is None or suspect.slot is None:
            return
        cleared = self._isolation.clear(int(self._table.num_confirmed[suspect.slot]))
        if cleared is not None and self._isolation.first() is not None:
            self._preempt(cleared)

    def _admit_suspect(self, step: StepBuilder, now_s: float) -> None:
        """Its turn has come when nobody else runs or is in flight; then it has the pool and the step to itself."""
        suspect = self._isolation.first()
        if suspect is None or self.num_running or self._in_flight or not suspect.has_mask:
            return
        prefix = self._find_prefix(suspect)
        num_left = suspect.num_confirmed_tokens - prefix.num_tokens
        self._queue.remove(suspect)
        self._admit(suspect, prefix, min(num_left, self._max_chunk, step.budget), step, now_s)

    def _can_admit(self, step: StepBuilder) -> bool:
        return step.budget > 0 and self._table.num_free > 0 and not step.num_preempted and not self._isolation

    def _num_partial(self, step: StepBuilder) -> int:
        """Prompts that are partly computed once this step has run."""
        return self._table.num_partial() - step.num_completed(self._table)

    def _find_prefix(self, request: Request) -> "_Prefix":
        """The longest beginning whose K and V it can take over: of its parent's prompt, or of what is cached.

        At least one token is left to compute: it is what the next one is sampled from.
        """
        if request.parent is not None and request.parent.can_be_forked:
            return _Prefix(request.num_prompt_tokens - 1, [])
        if not self._kv.enable_prefix_caching or not request.reads_prefix_cache:
            return _NO_PREFIX
        size, num_known = self._kv.block_size, request.num_confirmed_tokens
        if len(request.block_hashes) < num_known // size:
            tokens = request.prompt_token_ids.tobytes() + request.output_token_ids.tobytes()
            request.name_blocks(tokens[len(request.block_hashes) * size * _TOKEN_BYTES :], size * _TOKEN_BYTES)
        cached = self._kv.find_cached(request.block_hashes[: (num_known - 1) // size])
        return _Prefix(len(cached) * size, cached)

    def _fits(self, request: Request, prefix: "_Prefix") -> bool:
        """Whether all its known tokens fit, and what runs then keeps a reserve of one block each and the watermark.

        The first to run needs no reserve: the pool is its own, and its limit is not beyond the pool.
        """
        num_blocks = self._kv.num_blocks_for(request.num_confirmed_tokens) - prefix.num_tokens // self._kv.block_size
        num_reserved = max(self._num_watermark_blocks, self.num_running + 1) if self.num_running else 0
        return num_blocks + num_reserved <= self._kv.num_free_without(prefix.block_ids)

    def _admit(self, request: Request, prefix: "_Prefix", num_tokens: int, step: StepBuilder, now_s: float) -> None:
        """A slot, blocks for all its known tokens, and `num_tokens` of them in this step."""
        num_cached, num_known = prefix.num_tokens, request.num_confirmed_tokens
        request.become(RequestStatus.RUNNING, f"step {self.counters.num_steps}, {num_cached} tokens taken over")
        slot = self._table.take(request, self._limit(request))
        copies = self._allocate(slot, request, prefix, num_known)
        self._table.num_computed[slot] = num_cached
        self._table.num_named[slot] = len(prefix.block_ids)
        self._table.grow(np.array([slot]), self._kv.num_blocks_for(num_known))
        new = NewRequest(
            slot=slot,
            token_ids=request.prompt_token_ids.tobytes() + request.output_token_ids.tobytes(),
            num_prompt_tokens=request.num_prompt_tokens,
            num_computed_tokens=num_cached,
            block_ids=np.array(self._kv.block_ids(slot), "<i4").tobytes(),
            sampling=request.sampling,
        )
        step.add_new_request(new, copies)
        step.add_chunk(slot, num_tokens, num_cached)
        self._count_admitted(request, num_cached, now_s)

    def _count_admitted(self, request: Request, num_cached: int, now_s: float) -> None:
        counters = self.counters
        if request.scheduled_at_s is not None:
            counters.num_lost_tokens -= num_cached  # what is found again was not lost
            return
        request.scheduled_at_s = now_s
        request.num_cached_tokens = num_cached
        counters.num_prompt_tokens += request.num_prompt_tokens
        counters.num_cached_tokens += num_cached
        if self._kv.enable_prefix_caching and request.reads_prefix_cache:
            counters.num_cache_queries += request.num_prompt_tokens
            counters.num_cache_hits += num_cached

    def _allocate(self, slot: int, request: Request, prefix: "_Prefix", num_known: int) -> list[BlockCopy]:
        """Blocks for all known tokens; those of the prefix are shared, but for one that it fills in part: a copy."""
        if prefix.block_ids:
            self._kv.take_cached(slot, prefix.block_ids)
        elif prefix.num_tokens:
            assert request.parent is not None and request.parent.slot is not None, request.describe()
            self._kv.fork(request.parent.slot, slot, prefix.num_tokens)
        new_blocks = self._kv.allocate(slot, num_known)
        copies = self._kv.make_writable(slot, prefix.num_tokens, num_known)
        assert new_blocks is not None and copies is not None, request.describe()
        return copies

    def _limit(self, request: Request) -> int:
        """Length at which it ends: max_tokens, the model's length, or what it can fill the pool with, alone.

        The last token's K and V are never needed, so the pool bounds the length to one more than it holds.
        """
        wanted = request.num_prompt_tokens + request.max_tokens
        return min(wanted, self._max_model_len, self._kv.capacity_tokens + 1)

    # ---- results -----------------------------------------------------------------------------------------------------

    def _match(self, output: ModelRunnerOutput) -> tuple[StepInFlight, Tokens]:
        if not self._in_flight or self._in_flight[0].step_id != output.step_id:
            expected = self._in_flight[0].step_id if self._in_flight else None
            raise ProtocolError(f"result of step {output.step_id}, expected that of step {expected}")
        step = self._in_flight[0]
        token_ids = _integers(output.token_ids)
        num_sampled = int(np.count_nonzero(step.samples))
        if not output.error and token_ids.size != num_sampled:
            raise ProtocolError(f"step {step.step_id} has {token_ids.size} tokens for {num_sampled} slots")
        rows = _integers(output.no_token_rows)
        if rows.size and not (rows.min() >= 0 and rows.max() < token_ids.size):
            raise ProtocolError(f"step {step.step_id} has no_token_rows beyond its {token_ids.size} tokens")
        check_logprobs(output, token_ids.size, step, self._table)
        self._in_flight.popleft()
        return step, token_ids

    def _learn_step_time(self, step: StepInFlight, now_s: float) -> None:
        """The worker was free for the step when the one before was done, or when the step was made."""
        self._step_times.observe(step.load, now_s - max(self._last_result_s, step.scheduled_at_s), step.expected_s)
        self._last_result_s = now_s

    def _name_blocks(self, step: StepInFlight) -> None:
        """Blocks that this step filled can be found by their contents from now on; all their tokens are confirmed."""
        if not self._kv.enable_prefix_caching:
            return
        table, size = self._table, self._kv.block_size
        num_full = step.num_computed // size
        filled = (num_full > table.num_named[step.slots]) & (table.epoch[step.slots] == step.epochs)
        for slot, end in zip(step.slots[filled].tolist(), num_full[filled].tolist(), strict=True):
            chain = table.request(slot).block_hashes
            if len(chain) < end:
                tokens = table.token_bytes(slot, len(chain) * size, end * size)
                table.request(slot).name_blocks(tokens, size * _TOKEN_BYTES)
            self._kv.name_blocks(slot, chain, int(table.num_named[slot]), end)
            table.num_named[slot] = end

    def _confirm(self, slots: Slots, token_ids: Tokens, logprobs: RoutedLogprobs | None, now_s: float) -> StepOutcome:
        table = self._table
        num_output = table.confirm(slots, token_ids)
        self.counters.num_output_tokens += slots.size
        outcome = self._streamed(slots, token_ids, logprobs)
        self._first_tokens(slots[num_output == 1], now_s)
        stops = table.stops(slots, token_ids, num_output)
        ends = stops | (table.num_confirmed[slots] >= table.limit[slots])
        for row in ends.nonzero()[0].tolist():
            request = table.request(int(slots[row]))
            if stops[row]:
                request.stop_token_id = int(token_ids[row])
                self._end(request, RequestStatus.FINISHED_STOPPED, now_s, "stop token")
            else:
                self._end(request, RequestStatus.FINISHED_LENGTH_CAPPED, now_s, "limit reached")
            outcome.finished.append(request)
        table.advance_grammars(slots[~ends], token_ids[~ends])
        return outcome

    def _streamed(self, slots: Slots, token_ids: Tokens, logprobs: RoutedLogprobs | None) -> StepOutcome:
        stream: Mask = self._table.stream[slots]
        if not stream.all():
            slots, token_ids = slots[stream], token_ids[stream]
        return StepOutcome(self._table.client[slots], self._table.number[slots], token_ids, [], logprobs)

    def _first_tokens(self, slots: Slots, now_s: float) -> None:
        """The prompt of these slots is in the cache now: their children may go on."""
        for request in self._requests(slots):
            request.first_token_at_s = now_s
            request.can_be_forked = True
            self._release_children(request)

    def _end(self, request: Request, status: RequestStatus, now_s: float, why: str) -> None:
        was_running, was_added = request.status is RequestStatus.RUNNING, request.arrival_order >= 0
        request.become(status, f"before step {self.counters.num_steps}, {why}")
        request.finished_at_s = now_s
        if was_running:
            self._leave_slot(request)
        elif request in self._queue:
            self._queue.remove(request)
            self._release_children(request)
        elif was_added:  # else its grammar is being compiled
            assert request.parent is not None, request.describe()
            request.parent.waiting_children.remove(request)
            self._num_parked -= 1

    def _leave_slot(self, request: Request) -> None:
        slot = request.slot
        assert slot is not None, request.describe()
        self._table.release(request)
        self._kv.free(slot)
        request.can_be_forked = False
        self._release_children(request)

    def _release_children(self, request: Request) -> None:
        """Children wait for their parent no longer, whether they can share its prompt or must compute it themselves."""
        for child in request.waiting_children:
            self._queue.push(child)
        self._num_parked -= len(request.waiting_children)
        request.waiting_children.clear()

    def _requests(self, slots: Slots) -> list[Request]:
        return [self._table.request(slot) for slot in slots.tolist()]

    # ---- what holds between two doors --------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Raises AssertionError, with the history of the request at fault, unless all of the following hold.

        Blocks: free xor referenced, counts match the tables, all free if nothing runs; whoever writes next writes into
        a block of its own. Requests: those that run have a slot, and those that wait have none; counters keep the order
        of the glossary; placeholders are tokens in flight. Progress: with nothing in flight nobody waits for a result.
        Isolation: nobody runs beside a suspect.
        """
        self._kv.check_invariants()
        table = self._table
        running = table.running()
        _check(len(running) == table.num_used == np.count_nonzero(table.used), None, "slots in use do not add up")
        _check(bool(running) or self._kv.pool.num_free == self._kv.pool.num_usable, None, "blocks held by nobody")
        _check(0 <= self.num_tokens_in_use <= self._kv.num_reserved_tokens, None, "more tokens than room")
        for request in running:
            self._check_running(request)
        for request in self._queue.in_order():
            _check(request.slot is None and not request.can_be_forked, request, "waits and has a slot")
            _check(
                request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED), request, "waits in no such state"
            )
        _check(not self._isolation or len(running) <= 1, None, "somebody runs beside a suspect")
        if not self._in_flight:
            _check(not table.is_any_finishing(), None, "a request waits for a result that is not on its way")

    def _check_running(self, request: Request) -> None:
        table, slot = self._table, request.slot
        _check(slot is not None and table.requests[slot] is request, request, "slot and request differ")
        assert slot is not None, "checked above"
        _check(request.status is RequestStatus.RUNNING, request, "has a slot and does not run")
        prompt, confirmed, known = table.num_prompt[slot], table.num_confirmed[slot], table.num_known[slot]
        computed, limit = table.num_computed[slot], table.limit[slot]
        _check(
            request.num_cached_tokens < prompt <= confirmed <= known <= limit, request, "prompt … limit out of order"
        )
        _check(computed < known and computed <= table.capacity[slot], request, "computed beyond known or its blocks")
        blocks = self._kv.block_ids(slot)
        _check(len(blocks) * self._kv.block_size == table.capacity[slot], request, "capacity is not that of its blocks")
        own = blocks[int(computed) // self._kv.block_size :]
        _check(not any(self._kv.pool.is_shared(block) for block in own), request, "would write into a shared block")
        sampled = [(step.slots == slot) & (step.epochs == table.epoch[slot]) & step.samples for step in self._in_flight]
        num_on_way = sum(int(np.count_nonzero(mask)) for mask in sampled)
        _check(known - confirmed == num_on_way, request, "placeholders are not the tokens in flight")


def only_ends(finished: list[Request]) -> StepOutcome:
    """An outcome without new tokens."""
    nothing = np.empty(0, np.int32)
    return StepOutcome(nothing, nothing, nothing, finished)


def _integers(field: bytes) -> Tokens:
    if len(field) % 4:
        raise ProtocolError(f"{len(field)} bytes are no array of int32")
    return np.frombuffer(field, "<i4")


def _check(holds: object, request: Request | None, what: str) -> None:
    if not holds:
        raise AssertionError(what if request is None else f"{what}\n{request.describe()}")

"""The scheduler with a simulated worker behind it, and everything a frontend would have been told."""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from folovllm.common.config import SchedulingPolicy
from folovllm.common.messages.core_worker import ModelRunnerOutput, SamplingRow, SchedulerOutput
from folovllm.core_proc.block_pool import BlockPool
from folovllm.core_proc.kv_cache_manager import KVCacheManager
from folovllm.core_proc.logprobs_route import RoutedLogprobs
from folovllm.core_proc.request import Request, RequestStatus
from folovllm.core_proc.request_queue import RequestQueue
from folovllm.core_proc.scheduler import ChunkBounds, Scheduler, StepOutcome
from tests.fakes.simulated_grammar import SimulatedGrammar
from tests.fakes.simulated_logprobs import Place, places_of, unpack
from tests.fakes.simulated_worker import VOCABULARY, SimulatedWorker, answer, int32, scheduled

ALWAYS_WHOLE = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class SimulatedEngine:
    """Steps are executed as they are scheduled; their results wait until `update` is called.

    Args:
        num_blocks: usable blocks.
        depth: steps in flight that `run` keeps.
        chunking: the scheduler's bounds on prompts.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_model_len: int = 256,
        policy: SchedulingPolicy = "fcfs",
        depth: int = 2,
        enable_prefix_caching: bool = True,
        **chunking: Any,
    ) -> None:
        self.pool = BlockPool(num_blocks + 1)
        self.manager = KVCacheManager(self.pool, block_size, enable_prefix_caching=enable_prefix_caching)
        self.scheduler = Scheduler(
            kv_cache_manager=self.manager,
            queue=RequestQueue(policy),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            bounds=ChunkBounds(**chunking),
        )
        self.worker = SimulatedWorker(block_size, num_blocks + 1)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.depth = depth
        self.now_s = 0.0
        self.requests: list[Request] = []
        self.in_flight: collections.deque[ModelRunnerOutput] = collections.deque()
        self.steps: list[SchedulerOutput] = []
        self.streamed: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
        self.logprobs: dict[tuple[int, int], list[Place]] = collections.defaultdict(list)
        self.prompt_logprobs: dict[tuple[int, int], list[Place]] = collections.defaultdict(list)
        self.finished: list[Request] = []
        self.total_num_scheduled = 0

    def add(
        self, prompt: Sequence[int] | int, *, n: int = 1, client: int = 0, number: int | None = None, **options: Any
    ) -> list[Request]:
        """Adds a prompt (or one of that many tokens) with `n` answers; options are those of Request and SamplingRow."""
        first = len(self.requests)
        token_ids = [(first * 5 + i * i) % 97 for i in range(prompt)] if isinstance(prompt, int) else list(prompt)
        sampling = SamplingRow(
            seed=options.pop("seed", first),
            min_tokens=options.pop("min_tokens", 0),
            stop_token_ids=int32(options.pop("stop_token_ids", [])),
            logprobs=options.pop("logprobs", None),
            prompt_logprobs=options.pop("prompt_logprobs", None),
        )
        answers: list[Request] = []
        for index in range(n):
            request = Request(
                client=client,
                number=(first if number is None else number) + index,
                request_id=f"r{first}",
                prompt_token_ids=np.array(token_ids, np.int32),
                sampling=sampling,
                max_tokens=options.get("max_tokens", 8),
                priority=options.get("priority", 0),
                stream=options.get("stream", False),
                arrival_s=self.now_s,
                sample_index=index,
                parent=answers[0] if answers else None,
                cache_salt=options.get("cache_salt", ""),
                skip_reading_prefix_cache=options.get("skip_reading_prefix_cache", False),
            )
            if options.get("grammar"):  # "at once" or "late"
                request.grammar = SimulatedGrammar(VOCABULARY, is_late=options["grammar"] == "late")
            self.scheduler.add_request(request)
            self.scheduler.check_invariants()
            answers.append(request)
        self.requests += answers
        return answers

    def schedule(self, *, fails: bool = False) -> SchedulerOutput | None:
        """Has the next step made and executed; one that `fails` leaves garbage in the blocks it writes to."""
        self.now_s += 1.0
        step = self.scheduler.schedule(self.now_s)
        self.scheduler.check_invariants()
        if step is None:
            assert self.in_flight or not self.scheduler.has_unfinished, "stalled: requests left, and nothing to run"
            return None
        num_tokens = sum(count for _, count in scheduled(step))
        assert 0 < num_tokens <= self.max_num_batched_tokens
        self.total_num_scheduled += num_tokens
        self.steps.append(step)
        self.in_flight.append(self.worker.fail(step) if fails else self.worker.execute(step))
        return step

    def update(self, change: Callable[[ModelRunnerOutput], ModelRunnerOutput] | None = None) -> StepOutcome:
        """Hands the oldest result to the scheduler, changed by `change`."""
        output = self.in_flight.popleft()
        return self.receive(output if change is None else change(output))

    def receive(self, output: ModelRunnerOutput) -> StepOutcome:
        self.now_s += 1.0
        outcome = self.scheduler.update_from_output(output, self.now_s)
        self.scheduler.check_invariants()
        rows = zip(outcome.clients.tolist(), outcome.numbers.tolist(), outcome.token_ids.tolist(), strict=True)
        for client, number, token_id in rows:
            self.streamed[client, number].append(token_id)
        if outcome.logprobs is not None:
            self._take_logprobs(outcome, outcome.logprobs)
        self.finished += outcome.finished
        return outcome

    def _take_logprobs(self, outcome: StepOutcome, routed: RoutedLogprobs) -> None:
        places = unpack(routed.logprobs)
        for row, one in zip(routed.rows.tolist(), places, strict=True):
            assert one.entries[0][0] == outcome.token_ids[row], "the chosen token is the reported one"
            self.logprobs[int(outcome.clients[row]), int(outcome.numbers[row])].append(one)
        for client, part in routed.prompts:
            reported = self.prompt_logprobs[client, part.number]
            assert part.start == len(reported) + 1, "parts of a prompt come in order, none twice"
            reported += unpack(part.logprobs)

    def finish(
        self, requests: Sequence[Request], status: RequestStatus = RequestStatus.FINISHED_ABORTED, error: str = ""
    ) -> list[Request]:
        self.now_s += 1.0
        ended = self.scheduler.finish_requests(requests, status, self.now_s, error)
        self.scheduler.check_invariants()
        self.finished += ended
        return ended

    def lose_worker(self, run_alone: Callable[[list[Request]], list[Request]] = lambda _: []) -> list[Request]:
        """The worker ends and another one takes its place, with an empty cache; `run_alone` says whom to suspect."""
        self.in_flight.clear()
        lost = self.scheduler.lose_worker()
        self.scheduler.run_alone(run_alone(lost))
        self.scheduler.check_invariants()
        assert self.scheduler.num_running == 0
        assert self.pool.num_free == self.pool.num_usable
        assert self.pool.num_cached == 0
        self.worker = SimulatedWorker(self.worker.block_size, self.worker.num_blocks)
        self.worker.next_step_id = self.scheduler.counters.num_steps
        return lost

    def turn(self) -> None:
        """What the core does once: fills the pipeline, takes in one result."""
        while len(self.in_flight) < self.depth and self.schedule() is not None:
            pass
        if self.in_flight:
            self.update()

    def run(self, max_turns: int = 2000) -> None:
        """Runs until every request has ended, and checks all that must hold then."""
        for _ in range(max_turns):
            if not self.scheduler.has_unfinished and not self.in_flight:
                break
            self.turn()
        assert not self.scheduler.has_unfinished, f"not done after {max_turns} turns"
        self.check_end()

    def check_end(self) -> None:
        assert self.pool.num_free == self.pool.num_usable
        assert (self.scheduler.num_running, self.scheduler.num_waiting, self.scheduler.num_waiting_tokens) == (0, 0, 0)
        assert self.scheduler.num_tokens_in_use == 0
        assert len(set(self.finished)) == len(self.finished) == len(self.requests)
        for request in self.requests:
            self.check_answer(request)

    def check_answer(self, request: Request) -> None:
        """Its tokens are those it would have got alone (their beginning, if it was cut off); streamed ones the same."""
        output = request.output_token_ids.tolist()
        expected = self.expected(request)
        if request.status in ALWAYS_WHOLE:
            assert output == expected, request.describe()
            stopped = request.status is RequestStatus.FINISHED_STOPPED
            assert request.stop_token_id == (output[-1] if stopped else None)
        else:
            assert output == expected[: len(output)], request.describe()
        key = (request.client, request.number)
        if request.stream:
            assert self.streamed[key] == output, request.describe()
        self._check_logprobs(request, output)

    def _check_logprobs(self, request: Request, output: list[int]) -> None:
        key, sampling = (request.client, request.number), request.sampling
        prompt = request.prompt_token_ids.tolist()
        tokens = prompt + output
        places = [] if sampling.logprobs is None else places_of(tokens, len(prompt), len(tokens), sampling.logprobs)
        assert self.logprobs[key] == (places if request.stream else []), request.describe()
        reported = self.prompt_logprobs[key]
        number = sampling.prompt_logprobs
        expected = [] if number is None else places_of(prompt, 1, len(prompt), number)
        assert reported == expected[: len(reported)], request.describe()
        if output:
            assert reported == expected, request.describe()

    def expected(self, request: Request) -> list[int]:
        num_prompt = request.num_prompt_tokens
        room = min(self.max_model_len, self.manager.capacity_tokens + 1) - num_prompt
        max_tokens, has_grammar = min(request.max_tokens, room), request.grammar is not None
        return answer(request.prompt_token_ids.tolist(), request.sampling, max_tokens, has_grammar=has_grammar)

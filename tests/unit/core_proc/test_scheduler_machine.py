"""Any order of doors, over pools of any size: no token lost, repeated or mixed, no block lost, no standstill."""

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from folovllm.common.config import SchedulingPolicy
from folovllm.common.errors import RequestError
from folovllm.common.messages.core_worker import ModelRunnerOutput
from folovllm.core_proc.request import Request, RequestStatus
from tests.fakes.simulated_engine import SimulatedEngine
from tests.fakes.simulated_worker import int32, integers

MOST_IN_FLIGHT = 2
ENDS = st.sampled_from([RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_TIMED_OUT])


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(3, 24),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 5),
        more_tokens=st.integers(0, 12),
        policy=st.sampled_from(["fcfs", "priority"]),
        enable_prefix_caching=st.booleans(),
        threshold=st.sampled_from([None, 1, 3]),
        max_num_partial=st.sampled_from([None, 1, 2]),
        target_itl_s=st.sampled_from([None, 0.5, 2.0]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        more_tokens: int,
        policy: SchedulingPolicy,
        enable_prefix_caching: bool,
        threshold: int | None,
        max_num_partial: int | None,
        target_itl_s: float | None,
    ) -> None:
        self.engine = SimulatedEngine(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + more_tokens,
            max_model_len=40,
            policy=policy,
            enable_prefix_caching=enable_prefix_caching,
            long_prefill_token_threshold=threshold,
            max_num_partial_prefills=max_num_partial,
            target_itl_s=target_itl_s,
        )

    def live(self) -> list[Request]:
        return [request for request in self.engine.requests if not request.is_finished]

    def can_schedule(self) -> bool:
        return len(self.engine.in_flight) < MOST_IN_FLIGHT

    @rule(
        prompt=st.lists(st.integers(0, 3), min_size=1, max_size=14),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        max_tokens=st.integers(1, 20),
        min_tokens=st.integers(0, 3),
        stop_token_ids=st.one_of(st.just([]), st.just(list(range(0, 97, 9))), st.just([5, 40, 70])),
        priority=st.integers(0, 2),
        stream=st.booleans(),
        cache_salt=st.sampled_from(["", "", "tenant"]),
        skip_reading=st.sampled_from([False, False, True]),
        logprobs=st.sampled_from([None, None, 0, 2]),
        prompt_logprobs=st.sampled_from([None, None, None, 1]),
        grammar=st.sampled_from([None, None, "at once"]),
    )
    def add(
        self,
        prompt: list[int],
        n: int,
        max_tokens: int,
        min_tokens: int,
        stop_token_ids: list[int],
        priority: int,
        stream: bool,
        cache_salt: str,
        skip_reading: bool,
        logprobs: int | None,
        prompt_logprobs: int | None,
        grammar: str | None,
    ) -> None:
        engine = self.engine
        try:
            engine.add(
                prompt,
                n=n,
                client=len(engine.requests) % 2,
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                stop_token_ids=stop_token_ids,
                priority=priority,
                stream=stream,
                cache_salt=cache_salt,
                skip_reading_prefix_cache=skip_reading,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                grammar=grammar,
            )
        except RequestError:
            assert len(prompt) > engine.manager.capacity_tokens

    @precondition(can_schedule)
    @rule()
    def schedule(self) -> None:
        self.engine.schedule()

    @precondition(lambda self: self.engine.in_flight)
    @rule()
    def update(self) -> None:
        self.engine.update()

    @rule(num_turns=st.integers(1, 10), depth=st.integers(1, MOST_IN_FLIGHT))
    def go_on(self, num_turns: int, depth: int) -> None:
        self.engine.depth = depth
        for _ in range(num_turns):
            self.engine.turn()

    @precondition(can_schedule)
    @rule()
    def schedule_a_step_that_fails(self) -> None:
        self.engine.schedule(fails=True)

    @precondition(lambda self: self.engine.in_flight and self.engine.in_flight[0].error)
    @rule()
    def learn_that_a_step_failed(self) -> None:
        num_running = self.engine.scheduler.num_running
        outcome = self.engine.update()
        assert len(outcome.finished) <= num_running
        for request in outcome.finished:
            assert (request.status, request.error) == (RequestStatus.FINISHED_ERROR, "out of memory")

    @rule()
    def reset_prefix_cache(self) -> None:
        self.engine.manager.reset_prefix_cache()
        assert self.engine.pool.num_cached == 0

    @rule(data=st.data())
    def lose_worker(self, data: st.DataObject) -> None:
        def suspected(lost: list[Request]) -> list[Request]:
            return data.draw(st.lists(st.sampled_from(lost), unique=True)) if lost else []

        self.engine.lose_worker(suspected)

    @precondition(lambda self: self.engine.in_flight and self.engine.in_flight[0].token_ids)
    @rule(data=st.data())
    def no_token_left(self, data: st.DataObject) -> None:
        rows = range(len(integers(self.engine.in_flight[0].token_ids)))
        void = data.draw(st.lists(st.sampled_from(rows), unique=True, min_size=1))

        def leave_no_token(output: ModelRunnerOutput) -> ModelRunnerOutput:
            return msgspec.structs.replace(output, no_token_rows=int32(void))

        outcome = self.engine.update(leave_no_token)
        failed = [request for request in outcome.finished if request.status is RequestStatus.FINISHED_ERROR]
        assert len(failed) <= len(void)
        assert all("no token" in request.error for request in failed)

    @precondition(lambda self: self.live())
    @rule(data=st.data(), status=ENDS)
    def finish(self, data: st.DataObject, status: RequestStatus) -> None:
        request = data.draw(st.sampled_from(self.live()))
        assert self.engine.finish([request], status) == [request]
        assert self.engine.finish([request], status) == []
        assert request.status is status

    def teardown(self) -> None:
        self.engine.run()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)

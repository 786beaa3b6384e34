"""What a step holds, and what its result means: one case at a time."""

import numpy as np
import pytest

from folovllm.common.errors import ProtocolError, RequestError
from folovllm.common.messages.core_worker import ModelRunnerOutput
from folovllm.core_proc.block_pool import BlockPool
from folovllm.core_proc.kv_cache_manager import KVCacheManager
from folovllm.core_proc.request import Request, RequestStatus
from folovllm.core_proc.request_queue import RequestQueue
from folovllm.core_proc.scheduler import Scheduler
from tests.fakes.simulated_engine import SimulatedEngine
from tests.fakes.simulated_worker import answer, int32, integers, scheduled


def output_of(request: Request) -> list[int]:
    return [int(token_id) for token_id in request.output_token_ids]


def steps_of(engine: SimulatedEngine) -> list[list[tuple[int, int]]]:
    return [scheduled(step) for step in engine.steps]


# ---- one request -----------------------------------------------------------------------------------------------------


def test_a_request_is_sent_whole_once_and_then_only_by_its_slot() -> None:
    engine = SimulatedEngine(block_size=4, depth=1)
    (request,) = engine.add([3, 1, 4, 1, 5], max_tokens=5, seed=11, stop_token_ids=[1000])
    engine.run()
    (new,) = engine.steps[0].new_requests
    assert (new.slot, new.num_prompt_tokens, new.num_computed_tokens) == (0, 5, 0)
    assert integers(new.token_ids) == [3, 1, 4, 1, 5]
    assert integers(new.block_ids) == [1, 2]
    assert new.sampling == request.sampling
    assert steps_of(engine) == [[(0, 5)], [(0, 1)], [(0, 1)], [(0, 1)], [(0, 1)]]
    assert [integers(step.append_block_ids) for step in engine.steps] == [[], [], [], [], [3]]
    assert [integers(step.append_slots) for step in engine.steps] == [[], [], [], [], [0]]
    assert all(not step.new_requests and not step.block_copies for step in engine.steps[1:])
    assert [step.step_id for step in engine.steps] == [0, 1, 2, 3, 4]


def test_a_long_prompt_takes_several_steps_and_samples_in_the_last() -> None:
    engine = SimulatedEngine(max_num_seqs=2, max_num_batched_tokens=8, depth=1)
    (request,) = engine.add(20, max_tokens=2, stream=True)
    tokens_after: list[int] = []
    while engine.scheduler.has_unfinished:
        engine.turn()
        tokens_after.append(len(engine.streamed[0, 0]))
    assert steps_of(engine) == [[(0, 8)], [(0, 8)], [(0, 4)], [(0, 1)]]
    assert tokens_after == [0, 0, 1, 2]
    engine.check_end()
    assert request.finish_reason == "length"


def test_chunks_of_a_prompt_run_mixed_with_decodes_which_come_first() -> None:
    engine = SimulatedEngine(max_num_seqs=4, max_num_batched_tokens=8, depth=1)
    engine.add(4, max_tokens=20)
    engine.add(3, max_tokens=20)
    engine.turn()
    engine.add(14, max_tokens=3)
    engine.turn()
    engine.turn()
    engine.turn()
    assert steps_of(engine) == [
        [(0, 4), (1, 3)],
        [(0, 1), (1, 1), (2, 6)],
        [(0, 1), (1, 1), (2, 6)],
        [(0, 1), (1, 1), (2, 2)],
    ]
    engine.run()


def test_the_budget_left_over_goes_to_the_next_prompt_which_may_get_a_single_token() -> None:
    engine = SimulatedEngine(max_num_seqs=3, max_num_batched_tokens=6, depth=1)
    engine.add(5)
    engine.add(5)
    engine.turn()
    assert steps_of(engine) == [[(1, 1), (0, 5)]]
    engine.turn()
    assert steps_of(engine)[1] == [(0, 1), (1, 4)]
    engine.run()


def test_times_are_those_of_the_doors() -> None:
    engine = SimulatedEngine(max_num_seqs=1, depth=1)
    engine.now_s = 100.0
    (first,) = engine.add(2, max_tokens=2)
    (second,) = engine.add(2, max_tokens=1)
    engine.run()
    assert (first.queue_s, first.first_token_s, first.total_s) == (1.0, 2.0, 4.0)
    assert (second.queue_s, second.first_token_s, second.total_s) == (5.0, 6.0, 6.0)


# ---- two steps in flight ---------------------------------------------------------------------------------------------


def test_a_step_is_scheduled_before_the_token_of_the_one_before_is_known() -> None:
    engine = SimulatedEngine()
    (request,) = engine.add(3, max_tokens=4, stream=True)
    for _ in range(3):
        assert engine.schedule() is not None
    assert engine.streamed[0, 0] == []
    assert request.slot is not None
    assert engine.scheduler.num_tokens_in_use == 5
    engine.run()


def test_a_length_stop_is_known_ahead_and_costs_no_token() -> None:
    engine = SimulatedEngine()
    engine.add(3, max_tokens=2)
    assert [engine.schedule() is not None for _ in range(3)] == [True, True, False]
    engine.run()
    assert engine.total_num_scheduled == 3 + 1
    assert engine.scheduler.counters.num_output_tokens == 2


def test_a_stop_token_is_seen_a_step_late_and_the_token_after_it_is_dropped() -> None:
    engine = SimulatedEngine()
    prompt = [5, 6, 7]
    (probe,) = engine.add(prompt, max_tokens=3, seed=1)
    engine.run()
    stop = output_of(probe)[1]
    (request,) = engine.add(prompt, max_tokens=9, seed=1, stop_token_ids=[stop], stream=True)
    for _ in range(3):
        engine.schedule()
    outcomes = [engine.update() for _ in range(3)]
    assert [len(outcome.token_ids) for outcome in outcomes] == [1, 1, 0]
    assert outcomes[1].finished == [request]
    assert (request.finish_reason, request.stop_token_id) == ("stop", stop)
    engine.check_end()


def test_a_stop_token_at_the_last_place_is_a_stop() -> None:
    engine = SimulatedEngine()
    (probe,) = engine.add([5], max_tokens=2, seed=1)
    engine.run()
    (request,) = engine.add([5], max_tokens=2, seed=1, stop_token_ids=output_of(probe)[1:])
    engine.run()
    assert request.finish_reason == "stop"


def test_L07_min_tokens_passes_over_an_early_stop_token() -> None:
    engine = SimulatedEngine()
    (probe,) = engine.add([8, 8], max_tokens=6, seed=3)
    engine.run()
    tokens = output_of(probe)
    assert len(set(tokens)) == 6
    (request,) = engine.add([8, 8], max_tokens=6, seed=3, min_tokens=4, stop_token_ids=[tokens[1], tokens[4]])
    engine.run()
    assert output_of(request) == tokens[:5]
    assert request.stop_token_id == tokens[4]


def test_a_slot_taken_over_never_gets_the_token_of_the_request_before() -> None:
    engine = SimulatedEngine(max_num_seqs=1)
    (first,) = engine.add(3, max_tokens=9, stream=True)
    engine.schedule()
    engine.schedule()
    engine.finish([first])
    (second,) = engine.add(4, max_tokens=3, stream=True)
    step = engine.schedule()
    assert step is not None
    assert second.slot == 0 == step.new_requests[0].slot
    assert [engine.update().token_ids.size for _ in range(2)] == [0, 0]
    engine.run()
    assert output_of(first) == []


@pytest.mark.parametrize("depth", [1, 2])
def test_depth_policy_and_company_change_no_token(depth: int) -> None:
    engine = SimulatedEngine(max_num_seqs=3, max_num_batched_tokens=7, num_blocks=20, depth=depth)
    requests = [engine.add(3 + 2 * i, max_tokens=10 + i, seed=i, stream=i % 2 == 0)[0] for i in range(8)]
    engine.run()
    for i, request in enumerate(requests):
        assert output_of(request) == answer(request.prompt_token_ids.tolist(), request.sampling, 10 + i)


def test_answers_longer_than_any_first_guess_are_whole() -> None:
    engine = SimulatedEngine(num_blocks=300, block_size=4, max_model_len=1200)
    (request,) = engine.add(3, max_tokens=1000, stream=True)
    (other,) = engine.add(3, max_tokens=20)
    engine.run()
    assert request.output_token_ids.size == 1000
    assert other.output_token_ids.size == 20


# ---- admission -------------------------------------------------------------------------------------------------------


def test_L20_what_can_never_fit_is_refused_and_the_next_is_served() -> None:
    engine = SimulatedEngine(num_blocks=8, block_size=16, max_model_len=4096)
    with pytest.raises(RequestError, match=r"200 tokens.*4096.*128") as refused:
        engine.add(200)
    assert refused.value.field == "prompt_token_ids"
    assert (engine.scheduler.num_waiting, engine.requests) == (0, [])
    (short,) = engine.add(10)
    engine.run()
    assert short.finish_reason == "length"


def test_L20_an_answer_that_outgrows_the_pool_ends_when_it_is_full() -> None:
    engine = SimulatedEngine(num_blocks=8, block_size=16, max_model_len=4096, max_num_batched_tokens=256)
    (request,) = engine.add(100, max_tokens=100)
    engine.run(max_turns=40)
    assert request.finish_reason == "length"
    assert request.output_token_ids.size == 8 * 16 - 100 + 1
    assert engine.scheduler.counters.num_preemptions == 0


@pytest.mark.parametrize(("num_prompt", "num_output"), [(9, 1), (8, 2), (1, 9)])
def test_L17_the_models_length_ends_an_answer(num_prompt: int, num_output: int) -> None:
    engine = SimulatedEngine(max_model_len=10)
    (request,) = engine.add(num_prompt, max_tokens=50)
    engine.run()
    assert request.output_token_ids.size == num_output
    with pytest.raises(RequestError, match="10 tokens"):
        engine.add(10, max_tokens=1)


def test_admission_waits_for_the_whole_prompt_and_a_reserve() -> None:
    engine = SimulatedEngine(num_blocks=10, block_size=4, depth=1)
    engine.add(16, max_tokens=5)
    (second,) = engine.add(17, max_tokens=2)
    engine.turn()
    assert second.status is RequestStatus.WAITING  # 5 blocks are free of 6, but 2 must stay free
    engine.run()
    assert second.num_preemptions == 0
    assert engine.scheduler.counters.num_preemptions == 0


def test_the_watermark_is_a_share_of_the_pool() -> None:
    manager = KVCacheManager(BlockPool(101), 4)
    scheduler = Scheduler(
        kv_cache_manager=manager,
        queue=RequestQueue("fcfs"),
        max_num_seqs=4,
        max_num_batched_tokens=1000,
        max_model_len=1000,
        watermark=0.3,
    )
    engine = SimulatedEngine()
    requests = [engine.add(4 * num_blocks)[0] for num_blocks in (40, 30, 1)]
    for request in requests:
        scheduler.add_request(request)
    step = scheduler.schedule(0.0)
    assert step is not None
    assert len(step.new_requests) == 2  # 30 blocks are left, and are the reserve
    assert scheduler.num_waiting == 1


def test_the_first_in_line_is_not_overtaken_by_smaller_ones() -> None:
    engine = SimulatedEngine(num_blocks=10, block_size=4, depth=1)
    engine.add(16, max_tokens=4)
    (large,) = engine.add(24, max_tokens=2)
    (small,) = engine.add(2, max_tokens=2)
    engine.turn()
    assert (large.status, small.status) == (RequestStatus.WAITING, RequestStatus.WAITING)
    engine.run()
    assert large.first_token_at_s is not None
    assert small.first_token_at_s is not None
    assert large.first_token_at_s <= small.first_token_at_s


def test_no_more_run_than_there_are_slots() -> None:
    engine = SimulatedEngine(max_num_seqs=2, depth=1)
    for _ in range(5):
        engine.add(2, max_tokens=3)
    engine.turn()
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (2, 3)
    assert engine.scheduler.num_waiting_tokens == 6
    engine.run()


def test_priority_decides_who_runs_first() -> None:
    engine = SimulatedEngine(max_num_seqs=1, policy="priority")
    (last,) = engine.add(2, max_tokens=2, priority=5)
    (first,) = engine.add(2, max_tokens=2, priority=-1)
    (second,) = engine.add(2, max_tokens=2, priority=0)
    engine.run()
    assert engine.finished == [first, second, last]


def test_a_budget_below_the_number_of_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens=3 is below max_num_seqs=4"):
        SimulatedEngine(max_num_seqs=4, max_num_batched_tokens=3)


# ---- preemption ------------------------------------------------------------------------------------------------------


def two_that_do_not_fit(engine: SimulatedEngine, **options: int) -> list[Request]:
    return [engine.add(12, max_tokens=20, seed=index, **options)[0] for index in range(2)]


def run_until_preempted(engine: SimulatedEngine) -> Request:
    for _ in range(100):
        engine.turn()
        preempted = [request for request in engine.requests if request.status is RequestStatus.PREEMPTED]
        if preempted:
            return preempted[0]
    raise AssertionError("nobody was preempted")


def test_the_last_to_arrive_is_preempted_and_comes_back_with_its_tokens() -> None:
    engine = SimulatedEngine(num_blocks=10, enable_prefix_caching=False)
    first, second = two_that_do_not_fit(engine)
    assert run_until_preempted(engine) is second
    kept = output_of(second)
    assert 0 < len(kept) < 20
    assert (second.slot, first.status) == (None, RequestStatus.RUNNING)
    (waiting,) = engine.add(4, max_tokens=2)
    engine.run()
    back = [new for step in engine.steps for new in step.new_requests if new.sampling == second.sampling]
    assert len(back) == 2
    assert back[1].num_prompt_tokens == 12
    assert integers(back[1].token_ids)[12:] == kept
    assert second.first_token_at_s is not None
    assert waiting.scheduled_at_s is not None
    assert second.first_token_at_s < waiting.scheduled_at_s  # it went back to the head of the queue
    assert first.num_preemptions == 0
    assert second.num_preemptions == engine.scheduler.counters.num_preemptions == 1
    assert engine.scheduler.counters.num_lost_tokens >= 12 + len(kept) - 1


def test_L09_a_preempted_request_is_sampled_on_with_the_same_seed_and_index() -> None:
    engine = SimulatedEngine(num_blocks=10)
    requests = two_that_do_not_fit(engine)
    run_until_preempted(engine)
    engine.run()
    for request in requests:
        assert output_of(request) == answer(request.prompt_token_ids.tolist(), request.sampling, 20)


def test_the_victim_is_of_the_lowest_priority_not_the_last_to_arrive() -> None:
    engine = SimulatedEngine(num_blocks=10, policy="priority")
    (first,) = engine.add(12, max_tokens=20, priority=3)
    (second,) = engine.add(12, max_tokens=20, priority=0)
    assert run_until_preempted(engine) is first
    engine.run()
    assert second.num_preemptions == 0


def test_a_token_in_flight_for_a_preempted_request_is_dropped_even_if_it_runs_again() -> None:
    engine = SimulatedEngine(num_blocks=10, depth=2)
    first, second = two_that_do_not_fit(engine)
    while second.status is not RequestStatus.PREEMPTED:
        if len(engine.in_flight) == 2:
            engine.update()
        engine.schedule()
    engine.finish([first])
    engine.schedule()
    assert second.slot == 0
    assert len(engine.in_flight) >= 2
    engine.run()
    assert output_of(second) == engine.expected(second)


def test_who_needs_a_block_sits_out_while_somebodys_end_is_on_its_way() -> None:
    engine = SimulatedEngine(num_blocks=4, block_size=4, depth=2)
    ending, growing = engine.add(4, max_tokens=5)[0], engine.add(4, max_tokens=9)[0]
    engine.schedule()
    for _ in range(4):
        engine.schedule()
        engine.update()
    assert engine.pool.num_free == 0
    assert engine.schedule() is None  # `ending` only waits for its last token, `growing` for a block
    assert engine.update().finished == [ending]
    assert growing.status is RequestStatus.RUNNING
    engine.run()
    assert engine.scheduler.counters.num_preemptions == 0


def test_the_last_free_block_goes_to_the_higher_rank() -> None:
    engine = SimulatedEngine(num_blocks=6, policy="priority", depth=1)
    low = engine.add(4, max_tokens=14, priority=5)[0]
    engine.turn()
    high = engine.add(1, max_tokens=14, priority=1)[0]
    engine.turn()
    assert (low.slot, high.slot) == (0, 1)
    while engine.pool.num_free != 1:
        engine.turn()
    while low.status is RequestStatus.RUNNING:
        engine.turn()
    assert integers(engine.steps[-1].append_slots) == [1]  # both needed a block in this step
    engine.run()
    assert (low.num_preemptions, high.num_preemptions) == (1, 0)


def test_nobody_is_admitted_in_the_step_that_preempts() -> None:
    engine = SimulatedEngine(num_blocks=12, policy="priority", depth=1)
    engine.add(4, max_tokens=40, priority=1)
    victim = engine.add(20, max_tokens=30, priority=2)[0]
    while engine.pool.num_free:
        engine.turn()
    small = engine.add(1, max_tokens=1, priority=0)[0]
    while victim.status is RequestStatus.RUNNING:
        engine.turn()
    assert victim.num_preemptions == 1
    assert engine.pool.num_free > 3
    assert engine.steps[-1].new_requests == []
    assert small.scheduled_at_s is None
    engine.turn()
    assert small.is_finished
    engine.run()


def test_L21_two_requests_that_do_not_fit_together_preempt_once() -> None:
    engine = SimulatedEngine(num_blocks=10, block_size=16, max_num_seqs=8, max_num_batched_tokens=16, max_model_len=512)
    requests = [engine.add(60, max_tokens=60, stream=True)[0] for _ in range(2)]
    engine.run()
    assert all(request.output_token_ids.size == 60 for request in requests)
    assert max(request.num_preemptions for request in requests) <= 1


def test_L21_preemptions_stay_few_in_a_crowd() -> None:
    engine = SimulatedEngine(num_blocks=40, block_size=4, max_num_seqs=16, max_num_batched_tokens=64)
    requests = [engine.add(8 + i % 5, max_tokens=24, stream=True)[0] for i in range(40)]
    engine.run(max_turns=5000)
    assert max(request.num_preemptions for request in requests) <= 3
    assert engine.scheduler.counters.num_preemptions <= len(requests)


def test_L18_a_pool_in_turn_used_by_others_gives_the_same_answer_again() -> None:
    engine = SimulatedEngine(num_blocks=8, block_size=4)
    prompt = list(range(8))
    (cold,) = engine.add(prompt, max_tokens=4, seed=1)
    engine.run()
    engine.add(13, max_tokens=4)
    engine.add(11, max_tokens=4)
    engine.run()
    (again,) = engine.add(prompt, max_tokens=4, seed=1)
    engine.run()
    assert output_of(again) == output_of(cold)
    assert again.num_cached_tokens == 0


# ---- several answers to one prompt -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_prompt", "num_shared_blocks", "num_copies"), [(10, 2, 3), (9, 2, 0), (8, 1, 3), (5, 1, 0)]
)
def test_children_share_the_prompt_and_compute_its_last_token(
    num_prompt: int, num_shared_blocks: int, num_copies: int
) -> None:
    engine = SimulatedEngine(block_size=4, depth=1)
    answers = engine.add(num_prompt, n=4, max_tokens=6, seed=2, stream=True)
    engine.turn()
    engine.schedule()
    assert steps_of(engine) == [[(0, num_prompt)], [(0, 1), (1, 1), (2, 1), (3, 1)]]
    children = engine.steps[1].new_requests
    assert [new.num_computed_tokens for new in children] == [num_prompt - 1] * 3
    assert [new.sampling.sample_index for new in children] == [1, 2, 3]
    assert len(integers(engine.steps[1].block_copies)) == 2 * num_copies
    leader = engine.manager.block_ids(0)
    shared = [integers(new.block_ids)[:num_shared_blocks] for new in children]
    assert shared == [list(leader[:num_shared_blocks])] * 3
    assert engine.pool.num_shares == 3 * num_shared_blocks
    engine.run()
    assert [answer.num_cached_tokens for answer in answers] == [0] + [num_prompt - 1] * 3
    assert engine.scheduler.counters.num_cached_tokens == 3 * (num_prompt - 1)
    assert engine.scheduler.counters.num_prompt_tokens == 4 * num_prompt
    assert len({tuple(output_of(answer)) for answer in answers}) == 4


def test_L19_a_prompt_shared_whole_still_has_a_token_to_compute() -> None:
    engine = SimulatedEngine(block_size=16, max_num_batched_tokens=64)
    answers = engine.add(32, n=2, max_tokens=3)
    single = engine.add(1, n=2, max_tokens=3)
    engine.run()
    assert [request.num_cached_tokens for request in answers + single] == [0, 31, 0, 0]


def test_children_wait_until_a_long_prompt_is_through_and_others_do_not_wait_for_them() -> None:
    engine = SimulatedEngine(max_num_seqs=4, max_num_batched_tokens=8, depth=1)
    answers = engine.add(16, n=2, max_tokens=4)
    (other,) = engine.add(3, max_tokens=4)
    engine.turn()
    assert engine.scheduler.num_waiting == 2
    assert engine.scheduler.num_waiting_tokens == 1 + 3
    engine.turn()
    assert (answers[1].status, other.status) == (RequestStatus.WAITING, RequestStatus.WAITING)
    engine.turn()
    assert (answers[1].status, other.status) == (RequestStatus.RUNNING, RequestStatus.RUNNING)
    assert answers[1].num_cached_tokens == 15
    engine.run()


@pytest.mark.parametrize("moment", ["waiting", "running", "decoding"])
def test_children_outlive_their_parent(moment: str) -> None:
    engine = SimulatedEngine(max_num_seqs=1, depth=1, enable_prefix_caching=False)
    answers = engine.add(6, n=3, max_tokens=5, stream=True)
    if moment != "waiting":
        engine.schedule()
    if moment == "decoding":
        engine.update()
    engine.finish([answers[0]])
    engine.run()
    assert [answer.finish_reason for answer in answers] == ["abort", "length", "length"]
    assert [answer.num_cached_tokens for answer in answers] == [0, 0, 0]


def test_children_of_a_preempted_parent_compute_the_prompt_themselves() -> None:
    engine = SimulatedEngine(num_blocks=10, max_num_seqs=2, depth=1)
    engine.add(12, max_tokens=20)
    parent, child = engine.add(12, n=2, max_tokens=20)
    assert run_until_preempted(engine) is parent
    engine.run()
    assert parent.num_preemptions == 1
    assert output_of(child) == engine.expected(child)
    assert output_of(child) != output_of(parent)


def test_a_child_that_comes_after_its_parents_end_is_taken() -> None:
    engine = SimulatedEngine()
    (parent,) = engine.add(5, max_tokens=1)
    engine.run()
    late = Request(0, 1, "late", parent.prompt_token_ids, parent.sampling, 3, sample_index=1, parent=parent)
    engine.requests.append(late)
    engine.scheduler.add_request(late)
    engine.run()
    assert late.finish_reason == "length"


def test_aborted_children_leave_their_parent_alone() -> None:
    engine = SimulatedEngine(depth=1)
    answers = engine.add(6, n=3, max_tokens=5)
    engine.finish([answers[1]])
    engine.turn()
    engine.finish([answers[2]])
    assert engine.scheduler.num_waiting == 0
    engine.run()
    assert [answer.finish_reason for answer in answers] == ["length", "abort", "abort"]


def test_shared_tokens_are_in_use_once() -> None:
    engine = SimulatedEngine(block_size=4, depth=1)
    engine.add(9, n=3, max_tokens=6)
    engine.turn()
    engine.schedule()
    assert engine.scheduler.num_tokens_in_use == 10 + 1 + 1
    assert engine.manager.num_reserved_tokens == 4 * (3 + 1 + 1)
    engine.run()


# ---- who is told what ------------------------------------------------------------------------------------------------


def test_L23_equal_numbers_of_two_clients_are_two_requests() -> None:
    engine = SimulatedEngine()
    (one,) = engine.add(4, client=1, number=7, max_tokens=6, stream=True, seed=1)
    (two,) = engine.add(4, client=2, number=7, max_tokens=6, stream=True, seed=2)
    (gone,) = engine.add(4, client=3, number=7, max_tokens=6, stream=True, seed=3)
    engine.turn()
    engine.finish([gone])
    engine.run()
    assert engine.streamed[1, 7] == output_of(one)
    assert engine.streamed[2, 7] == output_of(two)
    assert output_of(one) != output_of(two)
    assert (one.finish_reason, two.finish_reason, gone.finish_reason) == ("length", "length", "abort")


def test_only_streaming_requests_have_their_tokens_reported_as_they_come() -> None:
    engine = SimulatedEngine(depth=1)
    (quiet,) = engine.add(3, max_tokens=3, client=0)
    (loud,) = engine.add(3, max_tokens=3, client=4, number=40, stream=True)
    engine.schedule()
    outcome = engine.update()
    assert (outcome.clients.tolist(), outcome.numbers.tolist()) == ([4], [40])
    assert outcome.token_ids.dtype == outcome.numbers.dtype == outcome.clients.dtype == np.int32
    engine.run()
    assert output_of(quiet) == engine.expected(quiet)
    assert engine.streamed[4, 40] == output_of(loud)


# ---- ends from outside, and failures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "status", [RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_TIMED_OUT, RequestStatus.FINISHED_ERROR]
)
def test_requests_end_wherever_they_are(status: RequestStatus) -> None:
    engine = SimulatedEngine(num_blocks=10, max_num_seqs=2)
    requests = two_that_do_not_fit(engine)
    requests += engine.add(4, n=2)
    preempted = run_until_preempted(engine)
    assert engine.finish(requests, status, "why") == requests
    assert {request.status for request in requests} == {status}
    assert {request.error for request in requests} == {"why"}
    assert output_of(preempted) == engine.expected(preempted)[: len(output_of(preempted))]
    assert engine.pool.num_free == 10
    engine.run()


def test_what_has_ended_is_passed_over() -> None:
    engine = SimulatedEngine()
    (request,) = engine.add(2, max_tokens=1)
    engine.run()
    assert engine.finish([request]) == []
    assert request.finish_reason == "length"


def test_a_failed_step_fails_its_requests_and_no_other() -> None:
    engine = SimulatedEngine(max_num_seqs=3, max_num_batched_tokens=6)
    first, second = engine.add(3, max_tokens=9)[0], engine.add(3, max_tokens=9)[0]
    engine.schedule()
    (third,) = engine.add(4, max_tokens=5, stream=True)
    engine.schedule()
    outcome = engine.update(lambda output: ModelRunnerOutput(output.step_id, error="out of memory"))
    assert outcome.finished == [first, second]
    assert [request.error for request in outcome.finished] == ["out of memory"] * 2
    assert outcome.token_ids.size == 0
    assert engine.update().finished == []
    engine.run()
    assert third.finish_reason == "length"


def test_a_failed_chunk_fails_its_request_though_it_samples_nothing() -> None:
    engine = SimulatedEngine(max_num_seqs=2, max_num_batched_tokens=4)
    parent, child = engine.add(10, n=2, max_tokens=3)
    engine.schedule()
    engine.schedule()
    outcome = engine.update(lambda output: ModelRunnerOutput(output.step_id, error="broken"))
    assert outcome.finished == [parent]
    engine.run()
    assert (parent.finish_reason, child.finish_reason) == ("error", "length")
    assert child.num_cached_tokens == 0


def test_a_row_without_a_token_ends_its_request_only() -> None:
    engine = SimulatedEngine(depth=1)
    first, second, third = (engine.add(3, max_tokens=4, stream=True)[0] for _ in range(3))
    engine.schedule()
    engine.update()
    engine.schedule()
    output = engine.in_flight.popleft()
    engine.receive(ModelRunnerOutput(output.step_id, output.token_ids, no_token_rows=int32([1])))
    assert second.finish_reason == "error"
    assert "no token" in second.error
    assert second.output_token_ids.size == 1
    engine.run()
    assert (first.finish_reason, third.finish_reason) == ("length", "length")


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (ModelRunnerOutput(1, int32([5])), "step 1, expected that of step 0"),
        (ModelRunnerOutput(0, int32([5, 6])), "2 tokens for 1 slots"),
        (ModelRunnerOutput(0), "0 tokens for 1 slots"),
        (ModelRunnerOutput(0, b"abc"), "3 bytes"),
        (ModelRunnerOutput(0, int32([5]), no_token_rows=int32([1])), "no_token_rows"),
        (ModelRunnerOutput(0, int32([5]), no_token_rows=int32([-1])), "no_token_rows"),
    ],
)
def test_a_result_that_does_not_match_is_refused_and_changes_nothing(output: ModelRunnerOutput, why: str) -> None:
    engine = SimulatedEngine()
    engine.add(3)
    engine.schedule()
    with pytest.raises(ProtocolError, match=why):
        engine.receive(output)
    engine.run()


def test_a_result_without_a_step_is_refused() -> None:
    with pytest.raises(ProtocolError, match="expected that of step None"):
        SimulatedEngine().receive(ModelRunnerOutput(0))


# ---- invariants ------------------------------------------------------------------------------------------------------


def test_nothing_to_do_is_no_step() -> None:
    engine = SimulatedEngine()
    assert engine.schedule() is None
    assert not engine.scheduler.has_unfinished
    assert engine.scheduler.counters.num_steps == 0


def test_a_broken_invariant_shows_the_history_of_the_request_at_fault() -> None:
    engine = SimulatedEngine()
    (request,) = engine.add(3)
    engine.schedule()
    engine.scheduler._table.num_known[0] += 1
    with pytest.raises(AssertionError, match=r"placeholders(.|\n)*request 'r0'(.|\n)*WAITING -> RUNNING: step 0"):
        engine.scheduler.check_invariants()
    engine.scheduler._table.num_known[0] -= 1
    request.status = RequestStatus.WAITING
    with pytest.raises(AssertionError, match="does not run"):
        engine.scheduler.check_invariants()


def test_a_lost_block_is_found() -> None:
    engine = SimulatedEngine()
    engine.add(3)
    engine.schedule()
    engine.pool.allocate(1)
    with pytest.raises(AssertionError, match="block tables"):
        engine.scheduler.check_invariants()

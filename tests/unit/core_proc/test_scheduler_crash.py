"""A worker that ends under the scheduler: every answer is the one that it would have been, and suspects run alone."""

import pytest

from folovllm.core_proc.request import Request, RequestStatus
from tests.fakes.simulated_engine import SimulatedEngine
from tests.fakes.simulated_worker import integers, scheduled


def numbers_in(engine: SimulatedEngine, first_step: int) -> list[set[int]]:
    """For each step from `first_step` on: the requests that got their slots in or before it and are scheduled."""
    owner: dict[int, int] = {}
    found = []
    for step in engine.steps[first_step:]:
        for new in step.new_requests:
            tokens = integers(new.token_ids)[: new.num_prompt_tokens]
            owner[new.slot] = next(r.number for r in engine.requests if r.prompt_token_ids.tolist() == tokens)
        found.append({owner[slot] for slot, _ in scheduled(step)})
    return found


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("crash_every", [1, 3])
def test_answers_after_crashes_are_those_without(depth: int, crash_every: int) -> None:
    engine = SimulatedEngine(depth=depth, max_num_batched_tokens=16)
    engine.add(9, n=2, stream=True, max_tokens=12, logprobs=1)
    engine.add(7, stream=True, max_tokens=9, grammar="at once")
    engine.add(20, stream=True, max_tokens=6, prompt_logprobs=2)
    engine.add(5, max_tokens=20, stop_token_ids=list(range(0, 97, 13)), min_tokens=4)
    for _ in range(6):
        for _ in range(crash_every):
            engine.turn()
        engine.lose_worker()
    engine.run()  # compares tokens, streams and log probabilities with those of requests that run undisturbed
    assert engine.scheduler.counters.num_preemptions > 6


def test_all_is_given_back_and_nothing_is_found_any_more() -> None:
    engine = SimulatedEngine()
    requests = engine.add(8, max_tokens=9) + engine.add(9, max_tokens=9)
    engine.turn()
    engine.turn()
    assert engine.lose_worker() == requests
    assert [request.status for request in requests] == [RequestStatus.PREEMPTED] * 2
    assert [request.num_crashes for request in requests] == [1, 1]
    assert engine.scheduler.num_waiting == 2
    engine.turn()
    assert all(new.num_computed_tokens == 0 for new in engine.steps[-1].new_requests)
    engine.run()


def test_who_was_not_in_flight_is_not_named() -> None:
    engine = SimulatedEngine(max_num_seqs=2, depth=1)
    (in_flight,) = engine.add(4)
    engine.schedule()
    (waiting,) = engine.add(4)
    (gone,) = engine.add(5)
    engine.finish([gone])
    assert engine.lose_worker() == [in_flight]
    assert (in_flight.num_crashes, waiting.num_crashes, gone.num_crashes) == (1, 0, 0)
    assert engine.lose_worker() == []  # before the new worker got a step
    engine.run()


def test_a_request_that_was_aborted_with_a_step_in_flight_is_not_named() -> None:
    engine = SimulatedEngine()
    aborted, other = engine.add(4) + engine.add(4)
    engine.schedule()
    engine.finish([aborted])
    assert engine.lose_worker() == [other]
    engine.run()


def test_children_of_a_prompt_that_was_lost_wait_for_nobody() -> None:
    engine = SimulatedEngine(max_num_batched_tokens=8)
    engine.add(20, n=3, max_tokens=4)
    engine.schedule()
    engine.lose_worker()
    assert engine.scheduler.num_waiting == 3
    engine.run()


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_suspects_run_alone_one_after_the_other_before_all_others(enable_prefix_caching: bool) -> None:
    engine = SimulatedEngine(depth=2, enable_prefix_caching=enable_prefix_caching)
    first, second, other = engine.add(6)[0], engine.add(7)[0], engine.add(8)[0]
    for _ in range(2):
        engine.turn()
    engine.lose_worker(lambda _: [second, first])
    (newcomer,) = engine.add(9)
    begin = len(engine.steps)
    engine.run()
    seen = numbers_in(engine, begin)
    everybody = {request.number for request in (first, second, other, newcomer)}
    alone = seen.index(everybody)
    assert seen[:alone] == [{second.number}] * (alone // 2) + [{first.number}] * (alone // 2)
    assert alone <= 8  # not until they end: only until they are past the place
    assert first.num_crashes == second.num_crashes == 0


def test_a_suspect_that_ends_alone_lets_the_others_go_on() -> None:
    engine = SimulatedEngine(depth=2)
    suspect, other = engine.add(6, max_tokens=3)[0], engine.add(7, max_tokens=9)[0]
    engine.turn()
    engine.lose_worker(lambda _: [suspect])
    engine.run()
    assert (suspect.finish_reason, other.finish_reason) == ("length", "length")


@pytest.mark.parametrize("is_running", [False, True])
def test_a_suspect_that_is_aborted_lets_the_others_go_on(is_running: bool) -> None:
    engine = SimulatedEngine(depth=2)
    suspect, _ = engine.add(6)[0], engine.add(7)[0]
    engine.turn()
    engine.lose_worker(lambda _: [suspect])
    if is_running:
        engine.turn()
    engine.finish([suspect])
    engine.run()


def test_a_suspect_without_a_mask_keeps_its_turn_and_runs_when_it_is_filled() -> None:
    engine = SimulatedEngine(depth=1)
    suspect = engine.add(6, grammar="late", max_tokens=3)[0]
    engine.add(7, max_tokens=3)
    engine.turn()
    assert suspect.grammar is not None
    suspect.grammar.fill()  # type: ignore[attr-defined]
    engine.lose_worker(lambda _: [suspect])
    assert engine.scheduler.num_running == 0
    while engine.scheduler.has_unfinished:
        suspect.grammar.fill()  # type: ignore[attr-defined]
        engine.turn()
    engine.check_end()


def test_another_crash_keeps_the_suspects_that_had_no_turn() -> None:
    engine = SimulatedEngine(depth=2)
    requests = [engine.add(6 + index)[0] for index in range(3)]
    engine.turn()
    engine.lose_worker(list)
    engine.schedule()
    assert engine.lose_worker() == [requests[0]]
    engine.finish([requests[0]], RequestStatus.FINISHED_ERROR, "it ends workers")
    begin = len(engine.steps)
    engine.run()
    seen = numbers_in(engine, begin)
    assert seen[0] == {1}
    assert {2} in seen[: seen.index({1, 2})]


def test_isolation_respects_the_bound_of_a_step() -> None:
    engine = SimulatedEngine(max_num_seqs=2, max_num_batched_tokens=4, depth=2)
    suspect: Request = engine.add(15)[0]
    engine.add(3)
    engine.turn()
    engine.lose_worker(lambda _: [suspect])
    engine.run()

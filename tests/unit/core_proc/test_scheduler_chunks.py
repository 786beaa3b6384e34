"""Prompts in chunks: how large they are, who goes first, and that nobody waits for ever."""

import msgspec
import pytest

from folovllm.core_proc.request import RequestStatus
from folovllm.core_proc.step_builder import StepInFlight
from tests.fakes.simulated_engine import SimulatedEngine
from tests.fakes.simulated_worker import scheduled


def steps_of(engine: SimulatedEngine) -> list[dict[int, int]]:
    return [dict(scheduled(step)) for step in engine.steps]


def test_one_prompt_gets_no_more_than_the_threshold_and_the_next_the_rest() -> None:
    engine = SimulatedEngine(
        max_num_seqs=4, max_num_batched_tokens=16, depth=1, long_prefill_token_threshold=6, enable_prefix_caching=False
    )
    engine.add(20, max_tokens=2)
    engine.add(8, max_tokens=2)
    for _ in range(4):
        engine.turn()
    assert steps_of(engine) == [{0: 6, 1: 6}, {0: 6, 1: 2}, {0: 6, 1: 1}, {0: 2}]
    engine.run()


def test_a_short_prompt_overtakes_a_long_one_and_takes_at_most_half() -> None:
    engine = SimulatedEngine(max_num_seqs=4, max_num_batched_tokens=16, depth=1, enable_prefix_caching=False)
    engine.add(60, max_tokens=2)
    engine.turn()
    (fits,) = engine.add(8, max_tokens=2)
    engine.turn()
    assert steps_of(engine)[1] == {1: 8, 0: 8}
    assert fits.first_token_at_s is not None
    (longer,) = engine.add(9, max_tokens=2)
    engine.turn()
    assert steps_of(engine)[2] == {1: 1, 2: 7, 0: 8}
    engine.turn()
    assert steps_of(engine)[3] == {2: 2, 0: 14}
    assert longer.first_token_at_s is not None
    engine.run()


def test_a_prompt_of_more_than_half_of_what_is_left_does_not_overtake() -> None:
    engine = SimulatedEngine(max_num_seqs=4, max_num_batched_tokens=16, depth=1, enable_prefix_caching=False)
    engine.add(60, max_tokens=2)
    engine.turn()
    (other,) = engine.add(23, max_tokens=2)
    engine.turn()
    assert steps_of(engine)[1] == {0: 16}
    assert other.status is RequestStatus.WAITING
    engine.run()


def test_of_those_that_overtake_the_shortest_comes_first_and_who_runs_before_who_waits() -> None:
    engine = SimulatedEngine(
        max_num_seqs=5, max_num_batched_tokens=16, num_blocks=100, depth=1, enable_prefix_caching=False
    )
    engine.add(120, max_tokens=2)
    engine.turn()
    engine.add(40, max_tokens=2)
    engine.add(6, max_tokens=2)
    engine.turn()
    assert steps_of(engine)[1] == {1: 8, 0: 8}
    engine.turn()
    assert steps_of(engine)[2] == {1: 8, 0: 8}
    engine.run()


def test_short_prompts_overtake_from_behind_a_long_one_in_the_queue() -> None:
    engine = SimulatedEngine(max_num_seqs=4, max_num_batched_tokens=16, depth=1, enable_prefix_caching=False)
    engine.add(60, max_tokens=2)
    engine.turn()
    (long,) = engine.add(50, max_tokens=2)
    (short,) = engine.add(5, max_tokens=2)
    engine.turn()
    assert (long.status, short.status) == (RequestStatus.WAITING, RequestStatus.RUNNING)
    assert steps_of(engine)[1] == {1: 5, 0: 11}
    engine.run()


def test_a_long_prompt_is_done_in_twice_its_time_however_many_short_ones_come() -> None:
    engine = SimulatedEngine(
        max_num_seqs=8, max_num_batched_tokens=16, num_blocks=200, depth=1, enable_prefix_caching=False
    )
    (long,) = engine.add(64, max_tokens=1)
    num_steps = 0
    while not long.is_finished:
        for _ in range(3):
            engine.add(4, max_tokens=1)
        engine.turn()
        num_steps += 1
    assert num_steps <= 2 * 64 // 16
    engine.run()


def test_equally_long_prompts_are_served_as_they_came() -> None:
    engine = SimulatedEngine(max_num_seqs=4, max_num_batched_tokens=16, depth=1, enable_prefix_caching=False)
    first, second = engine.add(40, max_tokens=1)[0], engine.add(40, max_tokens=1)[0]
    engine.run()
    assert first.first_token_at_s is not None
    assert second.first_token_at_s is not None
    assert first.first_token_at_s < second.first_token_at_s
    assert [step.get(0, 0) for step in steps_of(engine)[:3]] == [16, 16, 8]


def test_a_less_urgent_request_does_not_overtake() -> None:
    engine = SimulatedEngine(
        max_num_seqs=4, max_num_batched_tokens=16, depth=1, policy="priority", enable_prefix_caching=False
    )
    engine.add(60, max_tokens=2, priority=1)
    engine.turn()
    (later,) = engine.add(4, max_tokens=2, priority=2)
    (urgent,) = engine.add(4, max_tokens=2, priority=0)
    engine.turn()
    assert (later.status, urgent.status) == (RequestStatus.WAITING, RequestStatus.RUNNING)
    engine.run()


def test_a_request_without_room_for_its_blocks_is_not_passed_by_smaller_ones() -> None:
    engine = SimulatedEngine(num_blocks=22, max_num_batched_tokens=16, depth=1, enable_prefix_caching=False)
    engine.add(60, max_tokens=2)
    engine.turn()
    (large,) = engine.add(50, max_tokens=2)
    (small,) = engine.add(4, max_tokens=2)
    engine.turn()
    assert (large.status, small.status) == (RequestStatus.WAITING, RequestStatus.WAITING)
    engine.run()


@pytest.mark.parametrize("most", [1, 2])
def test_so_many_prompts_are_partly_computed_at_once(most: int) -> None:
    engine = SimulatedEngine(
        max_num_seqs=8,
        max_num_batched_tokens=16,
        num_blocks=200,
        depth=1,
        long_prefill_token_threshold=4,
        max_num_partial_prefills=most,
        enable_prefix_caching=False,
    )
    requests = [engine.add(30, max_tokens=1)[0] for _ in range(4)]
    while engine.scheduler.has_unfinished:
        engine.turn()
        running = sum(request.status is RequestStatus.RUNNING for request in requests)
        assert running <= most
    engine.check_end()


def test_a_prompt_that_is_done_in_one_step_is_no_partial_one() -> None:
    engine = SimulatedEngine(
        max_num_batched_tokens=16, depth=1, max_num_partial_prefills=1, enable_prefix_caching=False
    )
    engine.add(60, max_tokens=2)
    engine.turn()
    (short,) = engine.add(5, max_tokens=2)
    engine.turn()
    assert short.status is RequestStatus.RUNNING
    engine.run()


class _Clock:
    """Runs an engine whose steps take a time of their own."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine
        self.steps: list[StepInFlight] = []

    def turn(self) -> float:
        engine = self.engine
        step = engine.schedule()
        assert step is not None
        self.steps.append(engine.scheduler._in_flight[-1])
        counts = [count for _, count in scheduled(step)]
        prefill = sum(count for count in counts if count > 1)
        seconds = 0.02 + 0.001 * len(counts) + 0.0008 * prefill
        engine.now_s += seconds - 1.0  # `receive` adds one second
        engine.update()
        return seconds


@pytest.mark.parametrize("target_s", [0.06, 0.12])
def test_with_a_target_chunks_are_as_large_as_running_requests_allow(target_s: float) -> None:
    engine = SimulatedEngine(
        num_blocks=600,
        max_num_batched_tokens=512,
        max_model_len=2000,
        target_itl_s=target_s,
        depth=1,
        enable_prefix_caching=False,
    )
    clock = _Clock(engine)
    for _ in range(4):
        engine.add(4, max_tokens=150)
    for _ in range(20):
        clock.turn()
    (long,) = engine.add(1000, max_tokens=1)
    times = []
    while not long.is_finished:
        times.append(clock.turn())
    assert max(times) <= 1.1 * target_s
    assert sum(times[5:-1]) / len(times[5:-1]) >= 0.85 * target_s
    engine.run()


def test_a_step_remembers_what_it_was_expected_to_take_where_it_was_sized_for_a_target() -> None:
    steps = {}
    for target_s in (None, 0.1):
        engine = SimulatedEngine(num_blocks=100, target_itl_s=target_s, depth=1, enable_prefix_caching=False)
        clock = _Clock(engine)
        engine.add(4, max_tokens=40)
        for _ in range(10):
            clock.turn()
        (long,) = engine.add(100, max_tokens=1)
        while not long.is_finished:
            clock.turn()
        steps[target_s] = clock.steps
        engine.run()
    assert {step.expected_s for step in steps[None]} == {0.0}
    assert all((step.expected_s > 0) == step.load.is_mixed for step in steps[0.1])
    assert any(step.load.is_mixed for step in steps[0.1])


def test_a_target_that_cannot_be_kept_still_lets_prompts_go_on() -> None:
    engine = SimulatedEngine(
        max_num_batched_tokens=64, depth=1, target_itl_s=0.001, num_blocks=100, enable_prefix_caching=False
    )
    clock = _Clock(engine)
    engine.add(4, max_tokens=40)
    clock.turn()
    (long,) = engine.add(100, max_tokens=1)
    chunks = []
    for _ in range(40):
        clock.turn()
        chunks.append(steps_of(engine)[-1].get(1, 0))
        if long.is_finished:
            break
    assert long.is_finished
    assert set(chunks[2:-1]) == {16}
    engine.run()


def test_a_first_chunk_behind_a_cached_beginning_is_sized_for_its_context() -> None:
    engine = SimulatedEngine(num_blocks=900, max_num_batched_tokens=512, max_model_len=2000, target_itl_s=0.1, depth=1)

    def turn() -> tuple[int, float]:
        engine.schedule()
        load = engine.scheduler._in_flight[-1].load
        seconds = 0.02 + 0.0005 * load.num_prefill + 1e-6 * load.num_pairs
        engine.now_s += seconds - 1.0  # `receive` adds one second
        engine.update()
        return load.num_prefill, seconds

    shared = [i % 89 for i in range(1500)]
    for _ in range(4):
        engine.add(4, max_tokens=300)
    for end in (1, 3):  # the first round teaches what steps cost
        (long,) = engine.add([*shared, *range(end * 90)], max_tokens=1)
        while not long.is_finished:
            turn()
    (short,) = engine.add([*shared, *range(90, 97), *range(90)], max_tokens=1)
    num_tokens, seconds = turn()
    assert short.num_cached_tokens == 1500
    assert num_tokens < 70 and seconds < 0.11  # without its context it would get all of its 97 tokens: 0.21 s
    engine.run()


def test_without_running_requests_a_target_cuts_nothing() -> None:
    engine = SimulatedEngine(max_num_batched_tokens=64, depth=1, target_itl_s=0.001, num_blocks=100)
    engine.add(60, max_tokens=1)
    engine.turn()
    assert steps_of(engine) == [{0: 60}]
    engine.run()


def test_steps_get_no_larger_than_what_the_worker_has_memory_for() -> None:
    engine = SimulatedEngine(
        max_num_seqs=4, max_num_batched_tokens=32, depth=1, num_blocks=100, enable_prefix_caching=False
    )
    engine.add(70, max_tokens=2)
    for told in (10, 0, 20, 2):
        engine.schedule()
        engine.update(lambda output, told=told: msgspec.structs.replace(output, max_num_tokens=told))  # type: ignore[misc]
    assert steps_of(engine) == [{0: 32}, {0: 10}, {0: 10}, {0: 10}]
    assert engine.scheduler.max_num_batched_tokens == 4, "but every running request gets a token in each step"
    engine.run()
    assert steps_of(engine)[4:] == [{0: 4}, {0: 4}, {0: 1}]

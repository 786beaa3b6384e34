"""What a request takes over from the prefix cache, when, and what it leaves there."""

from typing import Any

import msgspec
import pytest

from folovllm.core_proc.request import Request
from tests.fakes.simulated_engine import SimulatedEngine
from tests.fakes.simulated_worker import integers, scheduled

PROMPT = list(range(20, 33))  # 13 tokens: three full blocks of 4, and one token


def run_one(engine: SimulatedEngine, prompt: list[int], **options: Any) -> Request:
    (request,) = engine.add(prompt, **options)
    engine.run()
    return request


def test_a_second_prompt_takes_over_the_full_blocks_of_the_first() -> None:
    engine = SimulatedEngine()
    first = run_one(engine, PROMPT)
    second = run_one(engine, PROMPT)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 12)
    new = next(new for step in engine.steps for new in step.new_requests if new.sampling == second.sampling)
    assert new.num_computed_tokens == 12
    assert integers(new.block_ids)[:3] == [1, 2, 3]
    counters = engine.scheduler.counters
    assert (counters.num_cache_queries, counters.num_cache_hits, counters.num_cached_tokens) == (26, 12, 12)


def test_at_least_one_token_is_computed() -> None:
    engine = SimulatedEngine()
    run_one(engine, PROMPT[:12])
    assert run_one(engine, PROMPT[:12]).num_cached_tokens == 8
    assert run_one(engine, PROMPT[:4]).num_cached_tokens == 0


@pytest.mark.parametrize("num_same", range(14))
def test_the_longest_common_beginning_in_full_blocks_is_found(num_same: int) -> None:
    engine = SimulatedEngine()
    run_one(engine, PROMPT)
    other = PROMPT[:num_same] + [0] * (14 - num_same)
    assert run_one(engine, other).num_cached_tokens == num_same // 4 * 4


@pytest.mark.parametrize("depth", [1, 2])
def test_answers_are_found_again_but_for_the_last_partial_block(depth: int) -> None:
    engine = SimulatedEngine(depth=depth)
    first = run_one(engine, PROMPT, max_tokens=9)
    conversation = [*PROMPT, *first.output_token_ids.tolist()]
    assert len(conversation) == 22
    # K and V of the last token were never computed, which is why 21 tokens are in the cache, 20 of them in full blocks.
    assert run_one(engine, [*conversation, 1, 2, 3]).num_cached_tokens == 20


def test_blocks_can_be_found_when_their_step_is_done_not_before() -> None:
    engine = SimulatedEngine(depth=1)
    engine.add(PROMPT, max_tokens=20)
    engine.schedule()
    (second,) = engine.add(PROMPT)
    engine.schedule()
    assert second.num_cached_tokens == 0
    engine.update()
    (third,) = engine.add(PROMPT)
    engine.schedule()
    assert third.num_cached_tokens == 12
    engine.run()


def test_a_prompt_in_chunks_can_be_taken_over_while_it_is_computed() -> None:
    engine = SimulatedEngine(max_num_seqs=4, max_num_batched_tokens=8, depth=1)
    engine.add(30, max_tokens=2)
    engine.turn()
    engine.turn()
    (second,) = engine.add(engine.requests[0].prompt_token_ids.tolist()[:18])
    engine.turn()
    engine.run()
    assert second.num_cached_tokens >= 16


def test_what_a_failed_step_wrote_is_never_found() -> None:
    engine = SimulatedEngine(depth=1)
    (first,) = engine.add(PROMPT)
    engine.schedule(fails=True)
    engine.update()
    assert first.finish_reason == "error"
    assert run_one(engine, PROMPT).num_cached_tokens == 0


def test_what_an_earlier_step_computed_outlives_a_failure() -> None:
    engine = SimulatedEngine(max_num_seqs=1, max_num_batched_tokens=8, depth=1)
    (first,) = engine.add(PROMPT)
    engine.turn()
    engine.schedule(fails=True)
    engine.update()
    assert first.finish_reason == "error"
    assert run_one(engine, PROMPT).num_cached_tokens == 8


def test_salts_keep_tenants_apart() -> None:
    engine = SimulatedEngine()
    run_one(engine, PROMPT, cache_salt="a")
    assert run_one(engine, PROMPT).num_cached_tokens == 0
    assert run_one(engine, PROMPT, cache_salt="b").num_cached_tokens == 0
    assert run_one(engine, PROMPT, cache_salt="a").num_cached_tokens == 12
    assert run_one(engine, PROMPT).num_cached_tokens == 12


def test_a_request_may_opt_out_of_reading_and_still_leaves_its_blocks() -> None:
    engine = SimulatedEngine()
    run_one(engine, PROMPT, skip_reading_prefix_cache=True)
    assert run_one(engine, PROMPT, skip_reading_prefix_cache=True).num_cached_tokens == 0
    assert run_one(engine, PROMPT).num_cached_tokens == 12
    assert engine.scheduler.counters.num_cache_queries == 13


def test_prompt_log_probabilities_need_the_whole_prompt_computed() -> None:
    engine = SimulatedEngine()
    run_one(engine, PROMPT)
    (request,) = engine.add(PROMPT)
    request.sampling = msgspec.structs.replace(request.sampling, prompt_logprobs=1)
    assert not request.reads_prefix_cache
    engine.run()
    assert request.num_cached_tokens == 0


def test_only_the_first_answer_reports_the_prompts_log_probabilities() -> None:
    engine = SimulatedEngine()
    (parent,) = engine.add(PROMPT)
    sampling = msgspec.structs.replace(parent.sampling, prompt_logprobs=3)
    child = Request(0, 7, "child", parent.prompt_token_ids, sampling, 3, sample_index=1, parent=parent)
    assert child.sampling.prompt_logprobs is None
    assert child.reads_prefix_cache


def test_switched_off_nothing_is_found_or_counted() -> None:
    engine = SimulatedEngine(enable_prefix_caching=False)
    run_one(engine, PROMPT)
    assert run_one(engine, PROMPT).num_cached_tokens == 0
    assert engine.pool.num_cached == engine.scheduler.counters.num_cache_queries == 0


def test_after_a_reset_the_prompt_is_computed_anew_and_found_again_after_it() -> None:
    engine = SimulatedEngine()
    run_one(engine, PROMPT)
    engine.manager.reset_prefix_cache()
    assert run_one(engine, PROMPT).num_cached_tokens == 0
    assert run_one(engine, PROMPT).num_cached_tokens == 12


def test_a_reset_while_a_request_runs_leaves_it_alone() -> None:
    engine = SimulatedEngine(depth=1)
    (first,) = engine.add(PROMPT, max_tokens=20)
    engine.turn()
    engine.manager.reset_prefix_cache()
    (second,) = engine.add(PROMPT, max_tokens=20)
    engine.run()
    assert second.num_cached_tokens == 0
    assert first.finish_reason == second.finish_reason == "length"


def test_the_oldest_blocks_are_given_up_first_and_a_sequences_end_before_its_beginning() -> None:
    engine = SimulatedEngine(num_blocks=8, depth=1, max_num_seqs=1)
    run_one(engine, [1] * 13, max_tokens=1)  # three named blocks
    run_one(engine, [2] * 13, max_tokens=1)  # three more
    run_one(engine, [3] * 13, max_tokens=1)  # four blocks: two without a name, and the last two of the first
    assert engine.pool.num_evicted == 2
    assert run_one(engine, [1] * 13, max_tokens=1).num_cached_tokens == 4
    assert run_one(engine, [3] * 13, max_tokens=1).num_cached_tokens == 12


def test_a_hit_makes_its_blocks_the_last_to_go() -> None:
    engine = SimulatedEngine(num_blocks=8, depth=1, max_num_seqs=1)
    run_one(engine, [1] * 13, max_tokens=1)
    run_one(engine, [2] * 13, max_tokens=1)
    assert run_one(engine, [1] * 13, max_tokens=1).num_cached_tokens == 12
    run_one(engine, [3] * 13, max_tokens=1)
    assert run_one(engine, [1] * 13, max_tokens=1).num_cached_tokens == 12


def test_a_preempted_request_finds_what_is_left_of_it() -> None:
    engine = SimulatedEngine(num_blocks=10)
    engine.add(12, max_tokens=20)
    (second,) = engine.add(12, max_tokens=20)
    engine.run()
    assert second.num_preemptions == 1
    (_, back) = [new for step in engine.steps for new in step.new_requests if new.sampling == second.sampling]
    lost_at_most = len(integers(back.token_ids)) - back.num_computed_tokens
    assert 0 <= engine.scheduler.counters.num_lost_tokens <= lost_at_most
    assert second.num_cached_tokens == 0  # of its prompt, when it was first admitted


def test_blocks_that_a_request_takes_over_are_not_counted_as_room_for_others() -> None:
    engine = SimulatedEngine(num_blocks=6, depth=1)
    run_one(engine, [1] * 17, max_tokens=1)  # five blocks, four named, all free now
    (first,) = engine.add([1] * 17, max_tokens=4)
    (second,) = engine.add([2] * 5, max_tokens=4)
    engine.schedule()
    assert first.num_cached_tokens == 16
    assert second.slot is None  # one block is free, it needs two
    engine.run()


def test_siblings_share_the_prompt_whether_by_fork_or_from_the_cache() -> None:
    engine = SimulatedEngine(max_num_seqs=1, depth=1)
    answers = engine.add(PROMPT, n=3, max_tokens=5)
    engine.run()
    assert [request.num_cached_tokens for request in answers] == [0, 12, 12]
    assert len({tuple(request.output_token_ids.tolist()) for request in answers}) > 1


def test_copied_blocks_of_a_fork_are_found_by_the_childs_own_tokens() -> None:
    engine = SimulatedEngine()
    parent, child = engine.add(PROMPT[:11], n=2, max_tokens=8)
    engine.run()
    assert any(step.block_copies for step in engine.steps)
    for request in (parent, child):
        conversation = [*PROMPT[:11], *request.output_token_ids.tolist()]
        assert run_one(engine, conversation).num_cached_tokens == 16


def test_names_cost_each_block_one_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimulatedEngine(depth=1)
    hashed = 0

    def count(self: Request, tokens: bytes, block_bytes: int) -> None:
        nonlocal hashed
        hashed += len(tokens) // block_bytes
        original(self, tokens, block_bytes)

    original = Request.name_blocks
    monkeypatch.setattr(Request, "name_blocks", count)
    request = run_one(engine, PROMPT, max_tokens=20)
    assert hashed == len(request.block_hashes) == (13 + 19) // 4


def test_a_cached_prompt_costs_the_step_only_what_is_left_of_it() -> None:
    engine = SimulatedEngine(max_num_seqs=3, max_num_batched_tokens=16, depth=1)
    run_one(engine, PROMPT, max_tokens=1)
    engine.steps.clear()
    for _ in range(3):
        engine.add(PROMPT, max_tokens=1)
    engine.schedule()
    assert scheduled(engine.steps[0]) == [(0, 1), (1, 1), (2, 1)]
    engine.run()


def test_tokens_in_use_count_shared_blocks_once() -> None:
    engine = SimulatedEngine(depth=1)
    engine.add(PROMPT, max_tokens=20)
    engine.turn()
    engine.add(PROMPT, max_tokens=20)
    engine.schedule()
    assert engine.scheduler.num_tokens_in_use == 14 + 13 - 12
    engine.run()


def test_stops_and_results_are_what_they_are_without_a_cache() -> None:
    def outputs(*, enable_prefix_caching: bool) -> list[list[int]]:
        engine = SimulatedEngine(num_blocks=30, enable_prefix_caching=enable_prefix_caching)
        for turn in range(12):
            prompt = [1, 2, 3, 4, 5, 6, 7, 8, turn % 3, turn % 2]
            engine.add(prompt, max_tokens=12, seed=turn, stop_token_ids=list(range(0, 97, 11)))
            engine.turn()
        engine.run()
        return [request.output_token_ids.tolist() for request in engine.requests]

    assert outputs(enable_prefix_caching=True) == outputs(enable_prefix_caching=False)

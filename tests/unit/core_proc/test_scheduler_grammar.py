"""Requests with a grammar wait for their own tokens and masks, and nobody waits for them."""

from typing import Any

import pytest

from folovllm.core_proc.request import Request, RequestStatus
from tests.fakes.simulated_engine import SimulatedEngine
from tests.fakes.simulated_grammar import SimulatedGrammar
from tests.fakes.simulated_worker import integers, masks_of, scheduled


def grammar_of(request: Request) -> SimulatedGrammar:
    assert isinstance(request.grammar, SimulatedGrammar)
    return request.grammar


def outputs_of(engine: SimulatedEngine) -> list[list[int]]:
    return [request.output_token_ids.tolist() for request in engine.requests]


def slots_of(engine: SimulatedEngine) -> list[list[int]]:
    return [sorted(integers(step.slots)) for step in engine.steps]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_masked_tokens_are_the_same_at_every_depth_and_neighbours_do_not_notice(depth: int) -> None:
    engine = SimulatedEngine(depth=depth)
    for index in range(6):
        engine.add(5 + index, max_tokens=12, stream=True, grammar="at once" if index % 2 else None)
    engine.run()  # compares each answer with what the request gets alone
    for request in engine.requests[1::2]:
        # The last token ends the request at its limit: nobody needs the grammar any more.
        assert grammar_of(request).taken == request.output_token_ids.tolist()[:-1]


def test_a_request_with_a_grammar_sits_out_until_its_token_is_there() -> None:
    engine = SimulatedEngine(depth=2)
    engine.add(3, max_tokens=4, grammar="at once")
    engine.add(3, max_tokens=4)
    engine.run()
    assert slots_of(engine)[:4] == [[0, 1], [1], [0, 1], [1]]
    assert [list(masks_of(step)) for step in engine.steps[:4]] == [[0], [], [0], []]


def test_alone_it_runs_step_by_step() -> None:
    engine = SimulatedEngine(depth=2)
    engine.add(3, max_tokens=4, grammar="at once")
    engine.run()
    assert slots_of(engine) == [[0]] * 4


def test_a_mask_that_is_late_holds_up_nobody_else() -> None:
    engine = SimulatedEngine(depth=1)
    (late,) = engine.add(3, max_tokens=3, grammar="late")
    engine.add(3, max_tokens=12)
    for _ in range(4):
        engine.turn()
    assert slots_of(engine) == [[0, 1], [1], [1], [1]]
    grammar_of(late).fill()
    engine.turn()
    assert slots_of(engine)[4] == [0, 1]
    grammar_of(late).fill()
    engine.run()


def test_chunks_that_do_not_sample_need_no_mask() -> None:
    engine = SimulatedEngine(max_num_seqs=2, max_num_batched_tokens=4, depth=2)
    engine.add(10, max_tokens=2, grammar="at once")
    engine.run()
    assert [dict(scheduled(step)) for step in engine.steps] == [{0: 4}, {0: 4}, {0: 2}, {0: 1}]
    assert [bool(step.masked_slots) for step in engine.steps] == [False, False, True, True]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_preemption_keeps_the_grammar_where_it_is(depth: int, enable_prefix_caching: bool) -> None:
    engine = SimulatedEngine(
        num_blocks=12, depth=depth, max_num_seqs=4, enable_prefix_caching=enable_prefix_caching, max_model_len=40
    )
    for index in range(5):
        engine.add(6, max_tokens=20, stream=True, grammar="at once" if index != 2 else None)
    engine.run()
    assert engine.scheduler.counters.num_preemptions > 0
    assert any(request.num_preemptions for request in engine.requests if request.grammar is not None)


def test_n_answers_have_a_grammar_each() -> None:
    engine = SimulatedEngine(depth=2)
    requests = engine.add(7, n=4, max_tokens=6, grammar="at once")
    engine.run()
    assert (
        len({id(request.grammar) for request in requests}) == len({tuple(output) for output in outputs_of(engine)}) == 4
    )


def test_a_request_without_a_mask_is_not_admitted_before_it_has_one() -> None:
    engine = SimulatedEngine(depth=1, num_blocks=8, max_num_seqs=2, max_model_len=40)
    (first,) = engine.add(6, max_tokens=14)
    (second,) = engine.add(6, max_tokens=14, grammar="late")
    for _ in range(40):
        if second.num_preemptions:
            break
        grammar_of(second).fill()
        engine.turn()
    assert second.status is RequestStatus.PREEMPTED
    taken = list(grammar_of(second).taken)
    grammar_of(second).mask = None  # as if it had been preempted with its mask on the way
    for _ in range(20):
        if not first.is_finished:
            engine.turn()
    assert first.is_finished
    assert second.status is RequestStatus.PREEMPTED
    assert engine.scheduler.schedule(engine.now_s) is None
    grammar_of(second).fill()
    engine.turn()
    assert second.slot is not None
    assert grammar_of(second).taken[: len(taken)] == taken
    for _ in range(20):
        grammar_of(second).fill()
        if engine.scheduler.has_unfinished:
            engine.turn()
    engine.check_end()


@pytest.mark.parametrize("where", ["running", "in flight", "preempted"])
def test_a_complete_grammar_ends_its_request_with_stop_wherever_it_is(where: str) -> None:
    engine = SimulatedEngine(depth=1, num_blocks=8, max_num_seqs=2, max_model_len=40)
    engine.add(6, max_tokens=14)
    (request,) = engine.add(6, max_tokens=14, grammar="at once")
    engine.turn()
    if where == "in flight":
        engine.schedule()
    for _ in range(40):
        if where == "preempted" and not request.num_preemptions:
            engine.turn()
    assert (request.status is RequestStatus.PREEMPTED) == (where == "preempted")
    assert engine.finish([request], RequestStatus.FINISHED_STOPPED) == [request]
    assert (request.finish_reason, request.stop_token_id, request.slot) == ("stop", None, None)
    for _ in range(40):
        if engine.scheduler.has_unfinished or engine.in_flight:
            engine.turn()
    assert not engine.scheduler.has_unfinished
    assert engine.pool.num_free == engine.pool.num_usable


def test_requests_whose_grammar_is_being_compiled_can_be_ended() -> None:
    engine = SimulatedEngine()
    fields: dict[str, Any] = {"client": 0, "number": 0, "request_id": "r", "max_tokens": 3}
    model = engine.add(3)[0]
    request = Request(prompt_token_ids=model.prompt_token_ids, sampling=model.sampling, **fields)
    assert engine.scheduler.finish_requests([request], RequestStatus.FINISHED_TIMED_OUT, 1.0) == [request]
    assert request.finish_reason == "timeout"
    engine.scheduler.check_invariants()
    engine.run()

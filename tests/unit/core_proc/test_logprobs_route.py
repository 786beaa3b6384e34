"""Which log probabilities are reported to whom, under which rows, and which results are refused for theirs."""

import msgspec
import numpy as np
import pytest

from folovllm.common.errors import ProtocolError
from folovllm.common.messages.core_worker import Logprobs, ModelRunnerOutput, PromptLogprobs
from folovllm.common.messages.frontend_core import RequestPromptLogprobs
from folovllm.core_proc.logprobs_route import RoutedLogprobs, logprobs_for, select_places
from tests.fakes.simulated_engine import SimulatedEngine
from tests.fakes.simulated_logprobs import Place, pack, places_of, unpack
from tests.fakes.simulated_worker import int32, integers

THREE = [Place([(1, -0.5)], 1), Place([(2, -1.0), (7, -0.25), (8, -0.5)], 3), Place([(3, -2.0), (9, -0.125)], 2)]


def outcome_of(engine: SimulatedEngine) -> RoutedLogprobs | None:
    return engine.update().logprobs


# ---- what is reported ------------------------------------------------------------------------------------------------


def test_nothing_is_reported_where_nobody_asked() -> None:
    engine = SimulatedEngine(depth=1)
    engine.add(3, stream=True)
    engine.schedule()
    assert outcome_of(engine) is None
    engine.run()


def test_L15_zero_is_the_sampled_token_alone_and_minus_one_the_whole_vocabulary() -> None:
    engine = SimulatedEngine(depth=2)
    engine.add(3, stream=True, logprobs=0, max_tokens=4)
    engine.add(4, stream=True, max_tokens=4)
    engine.add(5, stream=True, logprobs=-1, max_tokens=4)
    engine.run()
    assert [len(place.entries) for place in engine.logprobs[0, 0]] == [1] * 4
    assert engine.logprobs[0, 1] == []
    assert [len(place.entries) for place in engine.logprobs[0, 2]] == [98] * 4


def test_rows_are_those_of_the_tokens_that_are_reported() -> None:
    engine = SimulatedEngine(depth=1)
    engine.add(3, stream=True, max_tokens=4)
    engine.add(3, stream=False, max_tokens=4)  # its token is in no message
    (gone,) = engine.add(3, stream=True, logprobs=1, max_tokens=4)
    engine.add(3, stream=True, logprobs=1, max_tokens=4, client=1)
    engine.schedule()
    engine.finish([gone])
    outcome = engine.update()
    assert outcome.token_ids.size == 2
    assert outcome.logprobs is not None
    assert outcome.logprobs.rows.tolist() == [1]
    assert len(unpack(outcome.logprobs.logprobs)) == 1
    engine.run()


def test_where_all_who_asked_are_gone_nothing_is_left() -> None:
    engine = SimulatedEngine(depth=1)
    (gone,) = engine.add(3, stream=True, logprobs=1)
    engine.add(3, stream=True)
    engine.schedule()
    engine.finish([gone])
    routed = outcome_of(engine)
    assert routed is not None
    assert (routed.rows.tolist(), routed.logprobs, routed.prompts) == ([], None, [])
    engine.run()


def test_L16_a_prompt_in_chunks_is_reported_in_parts_that_fit_together_and_reads_no_cache() -> None:
    engine = SimulatedEngine(block_size=4, max_num_seqs=2, max_num_batched_tokens=7, depth=2)
    prompt = [(5 * i) % 11 for i in range(20)]
    for _ in range(2):  # the second finds the first one's blocks in the cache, and must not use them
        (request,) = engine.add(prompt, prompt_logprobs=1, max_tokens=2)
        engine.run()
        assert request.num_cached_tokens == 0
        assert engine.prompt_logprobs[0, request.number] == places_of(prompt, 1, 20, 1)
    (other,) = engine.add([*prompt, 1, 2], max_tokens=2)
    engine.run()
    assert other.num_cached_tokens == 20


def test_a_preempted_request_reports_its_prompt_once() -> None:
    engine = SimulatedEngine(num_blocks=8, block_size=4, max_num_seqs=3, max_num_batched_tokens=8, depth=2)
    requests = [engine.add(6 + i, prompt_logprobs=2, logprobs=2, stream=True, max_tokens=16)[0] for i in range(3)]
    engine.run()
    assert sum(request.num_preemptions for request in requests) > 0
    for request in requests:
        assert len(engine.prompt_logprobs[0, request.number]) == request.num_prompt_tokens - 1
        assert len(engine.logprobs[0, request.number]) == 16


def test_a_request_preempted_within_its_prompt_goes_on_where_it_was() -> None:
    engine = SimulatedEngine(num_blocks=9, block_size=4, max_num_seqs=2, max_num_batched_tokens=4, depth=1)
    (first,) = engine.add(8, max_tokens=20)
    for _ in range(4):
        engine.turn()
    (second,) = engine.add(20, prompt_logprobs=0, max_tokens=2)
    engine.run()
    assert first.num_preemptions == 0
    assert len(engine.prompt_logprobs[0, second.number]) == 19


def test_of_n_answers_the_first_reports_the_prompt() -> None:
    engine = SimulatedEngine(depth=2)
    first, *others = engine.add(9, n=3, prompt_logprobs=1, logprobs=1, stream=True, max_tokens=3)
    engine.run()
    assert len(engine.prompt_logprobs[0, first.number]) == 8
    for request in others:
        assert engine.prompt_logprobs[0, request.number] == []
        assert len(engine.logprobs[0, request.number]) == 3


def test_a_prompt_of_one_token_has_none() -> None:
    engine = SimulatedEngine()
    engine.add([5], prompt_logprobs=1)
    engine.run()
    assert engine.prompt_logprobs[0, 0] == []


# ---- whose it is -----------------------------------------------------------------------------------------------------


def test_each_frontend_gets_its_own_under_its_own_rows() -> None:
    part = RequestPromptLogprobs(4, 1, pack(THREE[:1]))
    routed = RoutedLogprobs(np.array([0, 2, 3], np.int32), pack(THREE), [(2, part)])
    clients = np.array([1, 1, 2, 1, 3])
    first, second, third, other = (logprobs_for(routed, client, clients == client) for client in (1, 2, 3, 4))
    assert (integers(first.rows), unpack(first.logprobs), first.prompts) == ([0, 2], [THREE[0], THREE[2]], [])
    assert (integers(second.rows), unpack(second.logprobs), second.prompts) == ([0], [THREE[1]], [part])
    assert (third.rows, third.logprobs, third.prompts) == (b"", None, [])
    assert (other.rows, other.logprobs, other.prompts) == (b"", None, [])


def test_prompts_alone_have_no_rows() -> None:
    part = RequestPromptLogprobs(4, 1, pack(THREE))
    routed = RoutedLogprobs(np.empty(0, np.int32), None, [(2, part)])
    mine = logprobs_for(routed, 2, np.array([True, False]))
    assert (mine.rows, mine.logprobs, mine.prompts) == (b"", None, [part])


def test_the_only_frontend_gets_the_workers_own_bytes() -> None:
    packed = pack(THREE)
    routed = RoutedLogprobs(np.array([0, 1, 2], np.int32), packed, [])
    assert logprobs_for(routed, 1, np.ones(3, np.bool_)).logprobs is packed


@pytest.mark.parametrize("chosen", [[True] * 3, [False] * 3, [False, True, False], [True, False, True]])
def test_some_of_the_places_are_whole(chosen: list[bool]) -> None:
    expected = [place for place, is_chosen in zip(THREE, chosen, strict=True) if is_chosen]
    assert unpack(select_places(pack(THREE), np.array(chosen))) == expected


# ---- what is refused -------------------------------------------------------------------------------------------------


def replaced(output: ModelRunnerOutput, **fields: object) -> ModelRunnerOutput:
    return msgspec.structs.replace(output, **fields)


BAD_FIELDS: list[dict[str, object]] = [
    {"logprob_rows": b"abc"},
    {"logprob_rows": int32([0])},  # two places, one row
    {"logprob_rows": b""},
    {"logprob_rows": int32([0, 2])},
    {"logprob_rows": int32([-1, 1])},
    {"logprob_rows": int32([1, 0])},
    {"logprob_rows": int32([1, 1])},
    {"logprobs": None},
    {"logprobs": pack(THREE)},
    {"logprobs": Logprobs(int32([0, 1]), int32([1]), int32([1]), int32([1, 1]))},
    {"logprobs": Logprobs(int32([-1, 2]), int32([1]), int32([1]), int32([1, 1]))},
    {"logprobs": Logprobs(int32([1, 1]), int32([1]), int32([1, 1]), int32([1, 1]))},
    {"logprobs": Logprobs(int32([1, 1]), int32([1, 1]), int32([1]), int32([1, 1]))},
    {"logprobs": Logprobs(int32([1, 1]), int32([1, 1]), int32([1, 1]), int32([1]))},
    {"logprobs": Logprobs(int32([2**31 - 1, 2**31 - 1]), b"", b"", int32([1, 1]))},
    {"logprobs": Logprobs(b"\x01", b"", b"", b"")},
    {"prompt_logprobs": [PromptLogprobs(2, 1, pack(THREE[:2]))]},
    {"prompt_logprobs": [PromptLogprobs(-1, 1, pack(THREE[:2]))]},
    {"prompt_logprobs": [PromptLogprobs(0, 0, pack(THREE[:2]))]},
    {"prompt_logprobs": [PromptLogprobs(0, 2, pack(THREE[:1]))]},  # token 1 was never reported
    {"prompt_logprobs": [PromptLogprobs(0, 1, pack(THREE))]},  # the prompt has three tokens
    {"prompt_logprobs": [PromptLogprobs(1, 1, pack(THREE[:2]))]},  # nobody asked
    {"prompt_logprobs": [PromptLogprobs(0, 1, Logprobs(int32([1]), b"", b"", int32([1])))]},
]


@pytest.mark.parametrize("fields", BAD_FIELDS)
def test_a_result_that_is_not_whole_is_refused_and_the_right_one_still_counts(fields: dict[str, object]) -> None:
    engine = SimulatedEngine(depth=1)
    engine.add(3, stream=True, logprobs=1, prompt_logprobs=1, max_tokens=2)
    engine.add(4, stream=True, logprobs=1, max_tokens=2)
    engine.schedule()
    right = engine.in_flight[0]
    with pytest.raises(ProtocolError, match=r"^step 0"):
        engine.scheduler.update_from_output(replaced(right, **fields), engine.now_s)
    engine.scheduler.check_invariants()
    engine.run()


def test_what_comes_for_a_prompt_that_is_gone_is_not_looked_into() -> None:
    engine = SimulatedEngine(depth=1)
    (request,) = engine.add(3, prompt_logprobs=1)
    engine.schedule()
    engine.finish([request])
    odd = [PromptLogprobs(0, 5, pack(THREE))]
    outcome = engine.update(lambda output: replaced(output, prompt_logprobs=odd))
    assert outcome.logprobs is not None
    assert outcome.logprobs.prompts == []


def test_the_number_that_was_reported_counts_the_first_token() -> None:
    engine = SimulatedEngine(max_num_seqs=2, max_num_batched_tokens=4, depth=1)
    (request,) = engine.add(10, prompt_logprobs=1, max_tokens=1)
    counted: list[int] = [request.num_prompt_logprobs]
    while not request.is_finished:
        engine.turn()
        counted.append(request.num_prompt_logprobs)
    assert counted == [1, 5, 9, 10]

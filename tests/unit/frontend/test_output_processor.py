"""Reports of a core, written out by hand → what callers get: texts, ends, deltas, metrics, failures."""

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest

from folovllm.common.errors import (
    EngineDeadError,
    ProtocolError,
    QueueFullError,
    RequestError,
    RequestFailedError,
)
from folovllm.common.messages.frontend_core import (
    EngineCoreOutputs,
    FinishedRequest,
    RejectedRequest,
    RequestPromptLogprobs,
)
from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend import int32
from folovllm.frontend.generation_defaults import ModelDefaults
from folovllm.frontend.input_processor import InputProcessor, Request
from folovllm.frontend.output_processor import OutputProcessor, RequestState
from folovllm.frontend.tokenizer import Tokenizer
from tests.fakes.fake_core_for_frontend import logprobs_of
from tests.fakes.tokenizers_ import case_tokenizer

IM_END = 151645


class Frontend:
    """An output processor, and a core that says what the test tells it to say."""

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self.tokenizer = tokenizer or case_tokenizer()
        self.outputs = OutputProcessor(self.tokenizer)
        self.aborted: list[int] = []
        self.next_number = 0

    def request(self, **params: Any) -> Request:
        inputs = InputProcessor(
            self.tokenizer,
            ModelDefaults(eos_token_ids=(IM_END,)),
            max_model_len=1000,
            num_valid_token_ids=151669,
            seeds=random.Random(0),
        )
        return inputs.process([87], SamplingParams(**{"max_tokens": 100, **params}), request_id="name")

    def add(self, *, stream: bool = False, **params: Any) -> RequestState:
        request = self.request(**params)
        state = self.outputs.add(request, self.next_number, stream=stream, now=1.0)
        self.next_number += request.params.n
        return state

    def report(
        self,
        pairs: Sequence[tuple[int, int]] = (),
        finished: Sequence[FinishedRequest] = (),
        rejected: Sequence[RejectedRequest] = (),
        now: float = 2.0,
        rows: Sequence[int] = (),
        prompts: Sequence[RequestPromptLogprobs] = (),
    ) -> list[RequestState]:
        """`rows`: indices into `pairs` of tokens that come with log probabilities, one alternative each."""
        numbers, tokens = int32.pack([n for n, _ in pairs]), int32.pack([t for _, t in pairs])
        message = EngineCoreOutputs(
            numbers,
            tokens,
            list(finished),
            list(rejected),
            int32.pack(rows),
            logprobs_of([pairs[row][1] for row in rows], 1) if rows else None,
            list(prompts),
        )
        done, to_abort = self.outputs.process(message, now)
        self.aborted += to_abort
        return done

    def play(self, ids: Sequence[int], end: FinishedRequest | None, per_step: int = 1) -> None:
        """The ids of request 0, some a step, the last ones together with the end."""
        for start in range(0, len(ids), per_step):
            last = start + per_step >= len(ids)
            pairs = [(0, token) for token in ids[start : start + per_step]]
            self.report(pairs, [end] if last and end is not None else [])


def ended(number: int = 0, reason: Any = "length", **values: Any) -> FinishedRequest:
    return FinishedRequest(number, reason, **values)


def whole(ids: Sequence[int], stop_token: int | None = None, **params: Any) -> Any:
    """The answer to a request that is reported once."""
    frontend = Frontend()
    state = frontend.add(**params)
    assert not state.by_token
    reason = "length" if stop_token is None else "stop"
    (done,) = frontend.report(finished=[ended(0, reason, stop_token_id=stop_token, token_ids=int32.pack(ids))])
    assert done is state
    return state.whole().outputs[0]


def streamed(ids: Sequence[int], stop_token: int | None = None, per_step: int = 1, **params: Any) -> list[Any]:
    """The deltas of a request that streams, taken after each step."""
    frontend = Frontend()
    state = frontend.add(stream=True, **params)
    deltas = []
    for start in range(0, len(ids), per_step):
        last = start + per_step >= len(ids)
        end = ended(0, "length" if stop_token is None else "stop", stop_token_id=stop_token)
        frontend.report([(0, token) for token in ids[start : start + per_step]], [end] if last else [])
        delta = state.take_delta()
        if delta is not None:
            deltas += delta.outputs
    assert state.finished
    return deltas


def joined(deltas: Sequence[Any]) -> tuple[str, list[int]]:
    return "".join(d.text for d in deltas), [token for d in deltas for token in d.token_ids]


L01_IDS = [32, 220, 99244, 123918, 250, 64, 82912, 246, 65]


@pytest.mark.parametrize("per_step", [1, 2, 3, 9])
def test_L01_deltas_join_to_the_whole(per_step: int) -> None:
    deltas = streamed(L01_IDS, per_step=per_step)
    assert joined(deltas) == ("A 世🦜a龘b", L01_IDS)
    assert whole(L01_IDS).text == "A 世🦜a龘b"
    assert all(delta.text and "\ufffd" not in delta.text for delta in deltas)


@pytest.mark.parametrize("ids, stop_token", [([87, 123918], None), ([87, 123918, IM_END], IM_END)])
def test_L02_an_end_inside_a_character(ids: list[int], stop_token: int | None) -> None:
    deltas = streamed(ids, stop_token)
    assert joined(deltas) == ("x\ufffd", ids)
    answer = whole(ids, stop_token)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("x\ufffd", ids, deltas[-1].finish_reason)


@pytest.mark.parametrize("skip", [True, False])
def test_L03_added_tokens_show_special_ones_only_if_asked(skip: bool) -> None:
    ids = [151667, 562, 151668, 16]
    assert whole(ids, skip_special_tokens=skip).text == "<think>ok</think>1"
    more = [*ids, IM_END]
    assert whole(more, IM_END, skip_special_tokens=skip).text == "<think>ok</think>1"
    assert whole(more, skip_special_tokens=False, ignore_eos=True).text == "<think>ok</think>1<|im_end|>"


def test_L04_stop_strings_across_tokens() -> None:
    for stop, text in ((["DEFGHIJ"], ""), (["EF"], "D")):
        frontend = Frontend()
        state = frontend.add(stream=True, stop=stop)
        frontend.play([1150, 12001, 23913, 41], None)
        delta = state.take_delta()
        assert delta is not None
        assert (delta.outputs[0].text, delta.outputs[0].finish_reason) == (text, "stop")
        assert delta.outputs[0].stop_reason == stop[0]
        assert frontend.aborted == [0]
        assert not frontend.outputs.live
    deltas = streamed([1150, 12001, 23913, 41], stop=["FGX"])
    assert [delta.text for delta in deltas] == ["DE", "FGHI", "J"]


def test_a_stop_string_in_the_last_step_needs_no_abort_and_wins() -> None:
    frontend = Frontend()
    state = frontend.add(stop=["FG"])
    assert state.by_token
    frontend.play([1150, 12001], ended())
    answer = state.whole().outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("DE", "stop", "FG")
    assert frontend.aborted == []


def test_tokens_behind_a_stop_string_are_dropped() -> None:
    frontend = Frontend()
    state = frontend.add(stop=["FG"])
    frontend.report([(0, 1150), (0, 12001), (0, 41)])
    frontend.report([(0, 41)])
    answer = state.whole().outputs[0]
    assert answer.token_ids == [1150, 12001]
    assert state.metrics.num_generation_tokens == 2
    assert frontend.aborted == [0]


@pytest.mark.parametrize("include, text", [(False, "JSON"), (True, "JSON<|im_end|>")])
def test_L05_a_stop_string_that_is_a_special_token(include: bool, text: str) -> None:
    params: dict[str, Any] = {"stop": ["<|im_end|>"], "ignore_eos": True, "include_stop_str_in_output": include}
    answer = whole([5370, IM_END], IM_END, **params)
    assert (answer.text, answer.stop_reason, answer.token_ids) == (text, "<|im_end|>", [5370, IM_END])
    deltas = streamed([5370, IM_END], IM_END, **params)
    assert joined(deltas)[0] == text
    assert deltas[-1].stop_reason == "<|im_end|>"


def test_L07_a_stop_string_below_min_tokens_is_passed_over() -> None:
    frontend = Frontend()
    state = frontend.add(stop=["\n"], min_tokens=5, max_tokens=10)
    frontend.play([16, 198, 16, 16, 16, 16, 198], None)
    answer = state.whole().outputs[0]
    assert (answer.text, answer.stop_reason, len(answer.token_ids)) == ("1\n1111", "\n", 7)


def test_the_reasons_of_token_stops() -> None:
    eos = whole([16, IM_END], IM_END)
    assert (eos.text, eos.finish_reason, eos.stop_reason, eos.token_ids) == ("1", "stop", None, [16, IM_END])
    own = whole([16, 64], 64, stop_token_ids=[64])
    assert (own.text, own.stop_reason, own.token_ids) == ("1", 64, [16, 64])
    assert whole([16, 64], 64, stop_token_ids=[64], include_stop_str_in_output=True).text == "1a"
    assert joined(streamed([16, 64], 64, stop_token_ids=[64]))[0] == "1"
    assert joined(streamed([16, 64], 64, stop_token_ids=[64], include_stop_str_in_output=True))[0] == "1a"


def test_a_slow_caller_gets_one_delta_for_many_steps() -> None:
    frontend = Frontend()
    state = frontend.add(stream=True)
    assert state.take_delta() is None
    frontend.play([64, 65, 16], None)
    delta = state.take_delta()
    assert delta is not None
    assert (delta.outputs[0].text, delta.outputs[0].token_ids, delta.finished) == ("ab1", [64, 65, 16], False)
    assert state.take_delta() is None


def test_an_end_without_news_is_a_delta_and_comes_once() -> None:
    frontend = Frontend()
    state = frontend.add(stream=True)
    frontend.report([(0, 64)])
    assert state.take_delta() is not None
    frontend.report([(0, IM_END)], [ended(0, "stop", stop_token_id=IM_END)])
    delta = state.take_delta()
    assert delta is not None
    assert (delta.outputs[0].text, delta.outputs[0].token_ids, delta.finished) == ("", [IM_END], True)
    assert state.take_delta() is None


def test_answers_of_one_request_are_told_apart() -> None:
    frontend = Frontend()
    other = frontend.add(stream=True)
    state = frontend.add(stream=True, n=2)
    frontend.report([(2, 64), (1, 65), (0, 16)], [ended(2)])
    delta = state.take_delta()
    assert delta is not None
    assert [(o.index, o.text, o.finish_reason) for o in delta.outputs] == [(0, "b", None), (1, "a", "length")]
    assert not delta.finished
    assert frontend.report([(1, 65)], [ended(1)]) == [state]
    delta = state.take_delta()
    assert delta is not None
    assert [(o.index, o.text) for o in delta.outputs] == [(0, "b")]
    assert delta.finished
    assert [o.text for o in state.whole().outputs] == ["bb", "a"]
    assert set(frontend.outputs.live) == {other.first_number}


def test_metrics_of_a_request_that_is_reported_once() -> None:
    frontend = Frontend()
    state = frontend.add(n=2)
    times = {"queue_s": 0.5, "first_token_s": 1.0, "total_s": 3.0, "num_preemptions": 1, "num_cached_tokens": 4}
    frontend.report(finished=[ended(0, token_ids=int32.pack([64] * 3), **times)], now=4.0)
    frontend.report(finished=[ended(1, token_ids=int32.pack([64] * 4), **times | {"first_token_s": 0.75})], now=5.0)
    metrics, output = state.metrics, state.whole()
    assert (metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time) == (1.0, 1.5, 1.75)
    assert (metrics.last_token_time, metrics.finished_time) == (5.0, 5.0)
    assert (metrics.num_generation_tokens, metrics.num_preemptions, output.num_cached_tokens) == (7, 2, 4)


def test_metrics_of_a_stream_use_the_frontends_clock() -> None:
    frontend = Frontend()
    state = frontend.add(stream=True)
    frontend.report([(0, 64)], now=2.0)
    frontend.report([(0, 64)], [ended(queue_s=0.25)], now=3.0)
    metrics = state.metrics
    assert (metrics.first_scheduled_time, metrics.first_token_time, metrics.last_token_time) == (1.25, 2.0, 3.0)
    assert metrics.time_per_output_token == 1.0


def test_max_tokens_0_is_finished_at_once() -> None:
    frontend = Frontend()
    state = frontend.add(max_tokens=0, n=2)
    assert state.finished
    assert not frontend.outputs.live
    assert [(o.text, o.finish_reason) for o in state.whole().outputs] == [("", "length")] * 2


@pytest.mark.parametrize(
    "rejected, error, message",
    [
        (RejectedRequest(0, "invalid", "too long", "prompt"), RequestError, "request name: too long"),
        (RejectedRequest(0, "queue_full", "full", retry_after_s=3.0), QueueFullError, "full"),
        (RejectedRequest(0, "draining", "closing"), EngineDeadError, "closing"),
    ],
)
def test_refusals_raise_and_leave_nothing(rejected: RejectedRequest, error: type[Exception], message: str) -> None:
    frontend = Frontend()
    state = frontend.add(n=3)
    assert frontend.report(rejected=[rejected]) == [state]
    assert not frontend.outputs.live
    with pytest.raises(error, match=message):
        state.whole()
    with pytest.raises(error, match=message):
        state.take_delta()


@pytest.mark.parametrize(
    "field, name", [("grammar", "structured_outputs"), ("bias_values", "logit_bias"), ("top_k", "top_k"), ("", None)]
)
def test_refused_fields_have_the_users_names(field: str, name: str | None) -> None:
    frontend = Frontend()
    state = frontend.add()
    frontend.report(rejected=[RejectedRequest(0, "invalid", "wrong", field)])
    with pytest.raises(RequestError) as caught:
        state.whole()
    assert caught.value.field == name


def test_one_failed_answer_fails_its_request_and_no_other() -> None:
    frontend = Frontend()
    state, other = frontend.add(n=2), frontend.add()
    frontend.report(finished=[ended(0, "error", error="out of paper")])
    with pytest.raises(RequestFailedError, match="request name failed: out of paper"):
        state.whole()
    assert frontend.aborted == [1]
    assert set(frontend.outputs.live) == {other.first_number}


def test_L34_what_is_on_its_way_for_a_dropped_request_is_passed_over() -> None:
    frontend = Frontend()
    state = frontend.add(n=2)
    assert frontend.outputs.forget(state) == [0, 1]
    assert frontend.outputs.forget(state) == []
    assert frontend.report([(0, 64)], [ended(1)], [RejectedRequest(0, "invalid", "late")]) == []
    again = frontend.outputs.add(frontend.request(), 0, stream=True, now=1.0)
    assert frontend.outputs.forget(state) == [], "the number belongs to another request now"
    frontend.report([(0, 64)])
    assert again.answers[0].token_ids == [64]


def test_an_abort_here_ends_what_is_left() -> None:
    frontend = Frontend()
    state = frontend.add(stream=True, n=2)
    frontend.report([(0, 64), (1, 64)], [ended(1)])
    assert frontend.outputs.end_locally(state, "abort", 5.0) == [0]
    output = state.whole()
    assert [o.finish_reason for o in output.outputs] == ["abort", "length"]
    assert output.finished
    assert state.metrics.finished_time == 5.0
    assert frontend.outputs.end_locally(state, "abort", 6.0) == []


def test_news_are_told_and_the_end_of_the_engine_fails_all() -> None:
    frontend = Frontend()
    news: list[str] = []
    frontend.outputs.add(frontend.request(), 5, stream=True, now=1.0, on_news=lambda: news.append("first"))
    state = frontend.outputs.add(frontend.request(), 6, stream=True, now=1.0, on_news=lambda: news.append("second"))
    frontend.report([(6, 64), (6, 64)])
    assert news == ["second"]
    frontend.outputs.fail_all(EngineDeadError("gone"))
    assert news == ["second", "first", "second"]
    assert state.finished
    with pytest.raises(EngineDeadError, match="gone"):
        state.take_delta()


def test_log_probabilities_find_their_answers() -> None:
    frontend = Frontend()
    first, plain, last = frontend.add(logprobs=1, n=2), frontend.add(stream=True), frontend.add(logprobs=1)
    assert first.by_token
    assert last.by_token
    frontend.report([(3, 64), (2, 65), (0, 16), (1, 87)], rows=[0, 2, 3])
    frontend.report([(2, 64), (0, 64)], rows=[1])
    for state, expected in ((first, [[16, 64], [87]]), (plain, [None]), (last, [[64]])):
        answers = state.whole().outputs
        shown = [None if a.logprobs is None else [next(iter(place)) for place in a.logprobs] for a in answers]
        assert shown == expected
        assert [a.token_ids for a in answers if a.logprobs is not None] == [ids for ids in expected if ids is not None]
    assert first.whole().outputs[0].cumulative_logprob == pytest.approx(-0.08)
    assert plain.whole().outputs[0].cumulative_logprob is None


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_behind_a_stop_string_are_dropped_with_their_tokens(stream: bool) -> None:
    frontend = Frontend()
    state = frontend.add(stream=stream, stop=["FG"], logprobs=1)
    frontend.report([(0, 1150), (0, 12001), (0, 41)], rows=[0, 1, 2])
    frontend.report([(0, 41)], rows=[0])
    output = state.take_delta() if stream else state.whole()
    assert output is not None
    answer = output.outputs[0]
    assert answer.token_ids == [1150, 12001]
    assert answer.logprobs is not None
    assert [list(place) for place in answer.logprobs] == [[1150, 1151], [12001, 12002]]
    assert answer.cumulative_logprob == pytest.approx(-13.151)


def test_log_probabilities_stay_parallel_where_text_is_held_back() -> None:
    frontend = Frontend()
    state = frontend.add(stream=True, logprobs=0)
    taken = []
    for token in [123918, 250, 64]:
        frontend.report([(0, token)], rows=[0])
        delta = state.take_delta()
        taken.append(
            delta and (delta.outputs[0].text, [next(iter(place)) for place in delta.outputs[0].logprobs or ()])
        )
    assert taken == [None, ("🦜", [123918, 250]), ("a", [64])]


def test_L16_prompt_log_probabilities_belong_to_the_request_and_come_once_in_a_stream() -> None:
    frontend = Frontend()
    frontend.add()
    state = frontend.add(stream=True, n=2, prompt_logprobs=1)
    frontend.report(prompts=[RequestPromptLogprobs(1, 1, logprobs_of([5, 6], 1))])
    assert state.take_delta() is None
    frontend.report(prompts=[RequestPromptLogprobs(1, 3, logprobs_of([7], 1))])
    frontend.report([(2, 64)])
    expected = [None, [5, 6], [6, 7], [7, 8]]
    for output, shown in ((state.take_delta(), expected), (state.whole(), expected)):
        assert output is not None
        assert [place and list(place) for place in output.prompt_logprobs or ()] == shown
    frontend.report([(1, 64)], [ended(1), ended(2)])
    delta = state.take_delta()
    assert delta is not None
    assert delta.prompt_logprobs is None


def test_L34_log_probabilities_for_requests_that_are_gone_are_passed_over() -> None:
    frontend = Frontend()
    state = frontend.add(logprobs=1, prompt_logprobs=1)
    other = frontend.add()
    frontend.outputs.forget(state)
    late = [RequestPromptLogprobs(number, 1, logprobs_of([5], 1)) for number in (0, 1, 77)]
    assert frontend.report([(0, 64)], rows=[0], prompts=late) == []
    assert other.whole().prompt_logprobs is None


def test_L17_the_token_that_comes_with_a_prompts_log_probabilities_is_dropped() -> None:
    frontend = Frontend()
    state = frontend.add(max_tokens=0, prompt_logprobs=0, logprobs=2)
    assert not state.finished
    frontend.report(prompts=[RequestPromptLogprobs(0, 1, logprobs_of([5], 0))])
    assert frontend.report([(0, 64)], [ended()]) == [state]
    output = state.whole()
    assert (output.outputs[0].token_ids, output.outputs[0].text, output.outputs[0].logprobs) == ([], "", [])
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 2
    assert state.metrics.num_generation_tokens == 0


def test_token_ids_alone_are_not_decoded() -> None:
    answer = whole([1150, 12001, IM_END], IM_END, detokenize=False)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", [1150, 12001, IM_END], "stop")
    deltas = streamed([123918, 250], detokenize=False)
    assert [(delta.text, delta.token_ids) for delta in deltas] == [("", [123918]), ("", [250])]


def test_a_time_limit_ends_with_what_there_is() -> None:
    frontend = Frontend()
    state = frontend.add(timeout_s=1.0)
    frontend.report(finished=[ended(0, "timeout", token_ids=int32.pack([64, 65]))])
    answer = state.whole().outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("ab", "timeout", None)


def test_python_time_per_token_without_stream() -> None:
    """At most 10 µs of this thread's own time: what others take of the machine does not count."""
    frontend = Frontend()
    ids = int32.pack([1150, 12001, 23913, 64] * 64)
    times = []
    for _ in range(5):
        states = [frontend.add(max_tokens=256) for _ in range(20)]
        finished = [ended(state.first_number, token_ids=ids) for state in states]
        begun = time.thread_time()
        frontend.report(finished=finished)
        outputs = [state.whole() for state in states]
        times.append((time.thread_time() - begun) / (20 * 256))
        assert all(len(output.outputs[0].text) == 64 * 7 for output in outputs)
    assert min(times) < 10e-6, f"{min(times) * 1e6:.2f} µs"


def test_what_makes_no_sense_for_one_request_fails_that_one_alone() -> None:
    """A token that is none, log probabilities that are missing, of an output or a prompt: the other request goes on."""
    for damage in ("token", "logprobs", "prompt", "whole"):
        frontend = Frontend()
        bad = frontend.add(stream=damage != "whole", logprobs=1 if damage == "logprobs" else None, n=2)
        if damage == "prompt":
            bad = frontend.add(stream=True, prompt_logprobs=0)
        number = bad.first_number
        good = frontend.add(stream=True)
        reports: dict[str, dict[str, Any]] = {
            "token": {"pairs": [(number, -1), (good.first_number, 9707)]},
            "logprobs": {"pairs": [(number, 9707), (good.first_number, 9707)]},
            "prompt": {"prompts": [RequestPromptLogprobs(number, 5, logprobs_of([1], 0))]},
            "whole": {"finished": [ended(number, "stop", token_ids=int32.pack([1, -2]))]},
        }
        assert frontend.report(**reports[damage]) == [bad]
        with pytest.raises(RequestFailedError, match=r"request name failed: the core (sent|reported|left)"):
            bad.whole()
        others = [number + i for i in range(bad.request.params.n)]
        assert frontend.aborted == (others if damage != "whole" else others[1:])
        frontend.report([(good.first_number, 9707)], [ended(good.first_number)])
        assert good.finished
        assert good.error is None
        assert not [live for live in frontend.outputs.live if live in others]


def test_a_message_that_makes_no_sense_at_all_changes_nothing() -> None:
    frontend = Frontend()
    state = frontend.add(stream=True)
    with pytest.raises(ProtocolError, match="1 tokens of 2 numbers"):
        frontend.outputs.process(EngineCoreOutputs(int32.pack([0, 0]), int32.pack([9707]), [ended()]), 1.0)
    assert not state.finished
    assert state.take_delta() is None

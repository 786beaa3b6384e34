from dataclasses import fields

import pytest

from folovllm.frontend.outputs import CompletionOutput, RequestMetrics, RequestOutput


def test_fields_are_what_vllm_users_know() -> None:
    names = [field.name for field in fields(RequestOutput)]
    assert names == [
        "request_id",
        "prompt",
        "prompt_token_ids",
        "prompt_logprobs",
        "outputs",
        "finished",
        "num_cached_tokens",
        "metrics",
    ]
    answer = CompletionOutput(0, "hi", [1, 2])
    assert (answer.cumulative_logprob, answer.logprobs, answer.finish_reason, answer.stop_reason) == (None,) * 4


def test_a_wrong_attribute_is_an_error() -> None:
    output = RequestOutput("r", "p", [1])
    with pytest.raises(AttributeError):
        output.output = []  # type: ignore[attr-defined]


def test_an_answer_is_finished_when_it_has_a_reason() -> None:
    assert not CompletionOutput(0, "", []).finished
    assert CompletionOutput(0, "", [], finish_reason="length").finished


def test_outputs_of_two_requests_are_not_shared() -> None:
    first, second = RequestOutput("1", None, [1]), RequestOutput("2", None, [1])
    first.outputs.append(CompletionOutput(0, "", []))
    assert second.outputs == []


def test_repr_is_short_and_complete_for_small_outputs() -> None:
    answer = CompletionOutput(0, "hi", [5, 6], finish_reason="stop")
    output = RequestOutput("7", "p", [1, 2], outputs=[answer], finished=True, num_cached_tokens=0)
    assert repr(output) == (
        "RequestOutput(request_id='7', prompt='p', prompt_token_ids=[1, 2], finished=True, num_cached_tokens=0, "
        "outputs=[\n    CompletionOutput(index=0, text='hi', token_ids=[5, 6], finish_reason='stop', "
        "stop_reason=None),\n])"
    )


def test_repr_cuts_long_prompts_and_ids() -> None:
    output = RequestOutput("7", "x" * 10_000, list(range(5000)))
    text = repr(output)
    assert len(text) < 500
    assert "[0, 1, 2, 3, 4, 5, 6, 7, … 5000 ids …, 4996, 4997, 4998, 4999]" in text
    assert "outputs=[]" in text


def test_metrics_are_none_until_known() -> None:
    metrics = RequestMetrics(arrival_time=10.0)
    assert metrics.time_in_queue is None
    assert metrics.time_to_first_token is None
    assert metrics.time_per_output_token is None
    assert metrics.total_time is None


def test_metrics_in_seconds() -> None:
    metrics = RequestMetrics(
        arrival_time=10.0,
        first_scheduled_time=10.5,
        first_token_time=11.0,
        last_token_time=14.0,
        finished_time=14.5,
        num_generation_tokens=4,
    )
    assert metrics.time_in_queue == 0.5
    assert metrics.time_to_first_token == 1.0
    assert metrics.time_per_output_token == 1.0
    assert metrics.total_time == 4.5


def test_one_token_has_no_time_per_token() -> None:
    metrics = RequestMetrics(arrival_time=0.0, first_token_time=1.0, last_token_time=1.0, num_generation_tokens=1)
    assert metrics.time_per_output_token is None

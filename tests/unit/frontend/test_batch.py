"""Portions and ends of one call, without a core."""

import random

import pytest

from folovllm.common.errors import RequestError
from folovllm.common.messages.frontend_core import EngineCoreOutputs, FinishedRequest, RejectedRequest
from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend import int32
from folovllm.frontend.batch import Batch
from folovllm.frontend.generation_defaults import ModelDefaults
from folovllm.frontend.input_processor import InputProcessor, Request
from folovllm.frontend.output_processor import OutputProcessor, RequestState


def requests(count: int, **params: int) -> list[Request]:
    inputs = InputProcessor(None, ModelDefaults(), max_model_len=50, num_valid_token_ids=100, seeds=random.Random(0))
    return inputs.process_many([[1 + i] for i in range(count)], SamplingParams(**params))  # type: ignore[arg-type]


def send(batch: Batch, outputs: OutputProcessor) -> list[RequestState]:
    """Sends the next portion; numbers count on from those sent before."""
    sent = []
    for request in batch.next_portion():
        first = sum(state.request.params.n for state in batch.states)
        sent.append(outputs.add(request, first, stream=False, now=0.0))
        batch.states.append(sent[-1])
    return sent


def finish(outputs: OutputProcessor, *numbers: int) -> list[RequestState]:
    ended = [FinishedRequest(number, "length", token_ids=int32.pack([number])) for number in numbers]
    return outputs.process(EngineCoreOutputs(finished=ended), 1.0)[0]


def test_portions_keep_to_the_bound_and_outputs_to_the_order() -> None:
    batch, outputs = Batch(requests(5, n=2), max_in_core=4), OutputProcessor(None)
    assert len(send(batch, outputs)) == 2
    assert batch.waits
    assert batch.next_portion() == []
    assert batch.take_finished(finish(outputs, 2)) == []
    (second,) = batch.take_finished(finish(outputs, 3))
    assert second.prompt_token_ids == [2]
    assert len(send(batch, outputs)) == 1
    before = batch.finished
    batch.take_finished(finish(outputs, 0, 1, 4, 5))
    assert len(send(batch, outputs)) == 2
    batch.take_finished(finish(outputs, 6, 7, 8, 9))
    assert (before, batch.finished) == (False, True)
    assert [output.prompt_token_ids for output in batch.outputs()] == [[1], [2], [3], [4], [5]]


def test_one_request_with_more_answers_than_the_bound_is_sent_alone() -> None:
    batch, outputs = Batch(requests(2, n=3), max_in_core=2), OutputProcessor(None)
    assert len(send(batch, outputs)) == 1
    assert batch.waits
    assert send(batch, outputs) == []
    batch.take_finished(finish(outputs, 0, 1, 2))
    assert len(send(batch, outputs)) == 1


def test_requests_that_ask_for_nothing_are_done_without_the_core() -> None:
    batch, outputs = Batch(requests(3, max_tokens=0)), OutputProcessor(None)
    assert len(send(batch, outputs)) == 3
    assert not batch.waits
    assert len(batch.take_finished([])) == 3
    assert batch.finished


def test_states_of_other_calls_are_passed_over_and_failures_raised() -> None:
    outputs = OutputProcessor(None)
    batch, other = Batch(requests(1)), Batch(requests(1))
    (state,) = send(batch, outputs)
    assert batch.waits
    assert other.take_finished([state]) == []
    rejected = RejectedRequest(0, "invalid", "too long")
    done, _ = outputs.process(EngineCoreOutputs(rejected=[rejected]), 1.0)
    with pytest.raises(RequestError, match="too long"):
        batch.take_finished(done)

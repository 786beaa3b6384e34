"""Latency and throughput of an engine behind a fake core."""

import pytest

from folovllm.common.errors import RequestError
from folovllm.frontend import int32
from folovllm.frontend.benchmark.offline import (
    latency_figures,
    measure_latency,
    measure_throughput,
    random_ids,
)
from folovllm.frontend.benchmark.workload import Work
from folovllm.frontend.llm import LLM
from tests.fakes.fake_core_for_frontend import FakeCore


def test_random_ids() -> None:
    prompts = random_ids(3, 5, 400, seed=1)
    assert [len(prompt) for prompt in prompts] == [5, 5, 5]
    assert all(100 <= token_id < 400 for prompt in prompts for token_id in prompt)
    assert prompts == random_ids(3, 5, 400, seed=1) != random_ids(3, 5, 400, seed=2)
    assert random_ids(1, 2, 1, seed=0) == [[0, 0]]


def test_latency_calls_are_equal_and_their_prompts_are_not(core: FakeCore) -> None:
    ended = []
    with LLM(engine=core.endpoint) as llm:
        seconds = measure_latency(
            llm, (2, 6, 3), n=2, num_warmups=1, num_iters=3, seed=0, on_end=lambda: ended.append(1)
        )
    assert len(seconds) == 3 and all(value > 0 for value in seconds) and len(ended) == 4
    assert {(request.n, request.max_tokens, len(request.prompt_token_ids) // 4) for request in core.requests} == {
        (2, 3, 6)
    }
    assert len({request.prompt_token_ids for request in core.requests}) == 8
    assert all(not int32.unpack(request.sampling.stop_token_ids) for request in core.requests), "eos is ignored"


def test_latency_figures() -> None:
    figures = latency_figures([1.0, 2.0, 3.0], [50, 99.5])
    assert figures["avg_latency"] == 2.0 and figures["latencies"] == [1.0, 2.0, 3.0]
    assert figures["percentiles"] == {"50": 2.0, "99.5": pytest.approx(2.99)}


def test_throughput_counts_tokens(core: FakeCore) -> None:
    with LLM(engine=core.endpoint) as llm:
        figures = measure_throughput(llm, [Work("abc", 3, 4), Work("defgh", 5, 2)], n=1, show_progress=False)
    seconds = figures["elapsed_time"]
    assert (figures["num_requests"], figures["total_num_tokens"]) == (2, 3 + 4 + 5 + 2)
    assert figures["requests_per_second"] == pytest.approx(2 / seconds)
    assert figures["tokens_per_second"] == pytest.approx(14 / seconds)
    assert figures["output_tokens_per_second"] == pytest.approx(6 / seconds)


def test_what_does_not_fit_is_refused(core: FakeCore) -> None:
    with LLM(engine=core.endpoint) as llm, pytest.raises(RequestError, match="the prompt has 70 tokens"):
        measure_latency(llm, (1, 70, 1), n=1, num_warmups=0, num_iters=1, seed=0, on_end=lambda: None)

"""Functions of the user's own, from the engine's start to the answer, through all three processes."""

import pathlib
from collections.abc import Iterator

import pytest

from folovllm import LLM, RequestFailedError, SamplingParams
from folovllm.common.errors import EngineStartError
from tests.integration.conftest import eventually, is_idle
from tests.integration.sampling import GREEDY, PROMPT, ids, run

ONLY, FAIL = "tests.fakes.processors:only", "tests.fakes.processors:fail"


@pytest.fixture(scope="module")
def llm(qwen3_folder: pathlib.Path) -> Iterator[LLM]:
    with LLM(qwen3_folder, dtype="float32", cpu_threads=1, logits_processors=[ONLY, FAIL]) as made:
        yield made


def test_a_processor_changes_the_answers_that_name_it(llm: LLM) -> None:
    plain = ids(llm, **GREEDY)
    first, second, third = run(
        llm,
        [PROMPT] * 3,
        [
            SamplingParams(**GREEDY, logits_processors={ONLY: [7, 8, 9]}),
            SamplingParams(**GREEDY),
            SamplingParams(temperature=1.0, max_tokens=4, ignore_eos=True, logits_processors={ONLY: [5]}),
        ],
    )
    count = len(plain)
    assert list(first.outputs[0].token_ids) == ([7, 8, 9] * count)[:count]
    assert list(second.outputs[0].token_ids) == plain
    assert list(third.outputs[0].token_ids) == [5] * 4


def test_a_processor_that_fails_costs_its_request_alone(llm: LLM) -> None:
    with pytest.raises(RequestFailedError, match="a logits processor failed"):
        run(llm, PROMPT, SamplingParams(**GREEDY, logits_processors={FAIL: 2}))
    assert eventually(lambda: is_idle(llm))
    assert ids(llm, **GREEDY) == ids(llm, **GREEDY, logits_processors={FAIL: 1000})


def test_what_cannot_be_loaded_ends_the_start_with_its_cause(qwen3_folder: pathlib.Path) -> None:
    with pytest.raises(
        EngineStartError, match=r"ConfigError in worker-0: .*'tests.fakes.processors:absent'.* has no 'absent'"
    ):
        LLM(qwen3_folder, dtype="float32", cpu_threads=1, logits_processors=["tests.fakes.processors:absent"])

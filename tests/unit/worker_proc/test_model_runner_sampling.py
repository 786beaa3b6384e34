"""ModelRunner with everything that requests may ask for: token for token the same however steps are cut and shared."""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from folovllm.common.messages.core_worker import Logprobs, ModelRunnerOutput, SamplingRow
from folovllm.worker_proc.models.registry import CausalLM
from folovllm.worker_proc.sample import logprobs as logprobs_module
from folovllm.worker_proc.sample.processors import LogitsProcessor
from folovllm.worker_proc.step_arrays import StepLimits
from tests.fakes import tiny_models
from tests.fakes.fake_core import int32, ints
from tests.fakes.runner_driver import Driver, Tracked, load_model, make_runner
from tests.fakes.simulated_logprobs import Place, unpack

LIMITS = StepLimits(
    num_slots=6,
    max_model_len=96,
    max_num_batched_tokens=128,
    num_blocks=160,
    block_size=4,
    vocab_size=tiny_models.VOCAB_SIZE,
    num_valid_token_ids=tiny_models.VOCAB_SIZE,
)
PROMPTS = ([7], [3, 5, 7, 7, 13], list(range(40, 61)), list(range(100, 137)), [9] * 12)
NUM_OUTPUT = 14
TOLERANCE = 2e-4  # of log probabilities: float32, sums in another order


def forbid_last(logits: torch.Tensor, token_ids: torch.Tensor, num_prompt_tokens: int, argument: Any) -> torch.Tensor:
    """Never the same token twice running; `argument` scales the rest."""
    logits[token_ids[-1]] = -torch.inf
    scaled: torch.Tensor = logits * argument["scale"]
    return scaled


def fail_at(logits: torch.Tensor, token_ids: torch.Tensor, num_prompt_tokens: int, argument: Any) -> torch.Tensor:
    if len(token_ids) - num_prompt_tokens == argument:
        raise RuntimeError("out of ideas")
    return logits


PROCESSORS: Mapping[str, LogitsProcessor] = {"forbid": forbid_last, "fail": fail_at}

# One request for each prompt: greedy and drawn, every constraint, alone and with others.
ROWS = (
    SamplingRow(presence_penalty=1.5, frequency_penalty=0.75),
    SamplingRow(temperature=0.9, seed=11, repetition_penalty=1.4, bad_words=[int32([7, 9]), int32([8])], logprobs=2),
    SamplingRow(
        temperature=1.1,
        top_p=0.9,
        seed=12,
        bias_token_ids=int32([4, 5]),
        bias_values=np.array([3, -100], "<f4").tobytes(),
        frequency_penalty=-0.5,
        logprobs=0,
    ),
    SamplingRow(
        allowed_token_ids=int32(range(50, 90)), repetition_penalty=0.8, min_tokens=4, stop_token_ids=int32([60])
    ),
    SamplingRow(temperature=0.7, top_k=20, seed=13, logits_processors=[("forbid", '{"scale": 0.5}')], logprobs=-1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_models.make_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="module")
def model(folder: pathlib.Path) -> CausalLM:
    return load_model(folder, LIMITS.max_model_len)


@pytest.fixture(scope="module")
def reference(folder: pathlib.Path) -> Any:
    return tiny_models.load_reference(folder)


@pytest.fixture
def driver(model: CausalLM, folder: pathlib.Path) -> Driver:
    return make_driver(model, folder)


def make_driver(model: CausalLM, folder: pathlib.Path) -> Driver:
    return Driver(make_runner(model, folder, LIMITS, processors=PROCESSORS), LIMITS)


@pytest.fixture(scope="module")
def alone(model: CausalLM, folder: pathlib.Path) -> list[list[int]]:
    outputs = []
    for prompt, row in zip(PROMPTS, ROWS, strict=True):
        driver = make_driver(model, folder)
        driver.join(0, prompt, row)
        outputs.append(driver.finish(0, NUM_OUTPUT)[:NUM_OUTPUT])
    return outputs


def missing(request: Tracked) -> int:
    return request.num_known - request.num_computed


def test_the_parameters_matter(driver: Driver, alone: list[list[int]]) -> None:
    """Each answer differs from the plain one, so that the equalities below show something."""
    for prompt, row, output in zip(PROMPTS, ROWS, alone, strict=True):
        plain = SamplingRow(row.temperature, row.top_k, row.top_p, row.min_p, row.seed)
        driver.join(0, prompt, plain)
        assert driver.finish(0, NUM_OUTPUT) != output


def test_together_in_any_order_as_alone(driver: Driver, alone: list[list[int]]) -> None:
    for turn in range(2):
        order = range(5) if turn == 0 else range(4, -1, -1)
        requests = {i: driver.join(slot, PROMPTS[i], ROWS[i]) for slot, i in enumerate(order)}
        driver.join(5, PROMPTS[1])
        while any(len(request.output) < NUM_OUTPUT for request in requests.values()):
            driver.step({slot: missing(request) for slot, request in driver.requests.items()})
        assert [requests[i].output[:NUM_OUTPUT] for i in range(5)] == alone


def test_l11_after_coming_back_as_undisturbed(driver: Driver, alone: list[list[int]]) -> None:
    """What was generated counts on: penalties, bad words, min_tokens and the draw."""
    for i, (prompt, row) in enumerate(zip(PROMPTS, ROWS, strict=True)):
        for cut in (1, 6, 13):
            driver.join(i, [*prompt, *alone[i][:cut]], row, num_prompt=len(prompt))
            assert driver.finish(i, NUM_OUTPUT)[:NUM_OUTPUT] == alone[i]


def test_steps_submitted_ahead_give_the_same(driver: Driver, alone: list[list[int]]) -> None:
    """Depth 2: the last token is known on the device alone when the next one is chosen."""
    requests = [driver.join(slot, prompt, row) for slot, (prompt, row) in enumerate(zip(PROMPTS, ROWS, strict=True))]
    driver.submit({slot: len(prompt) for slot, prompt in enumerate(PROMPTS)})
    for _ in range(NUM_OUTPUT - 1):
        driver.submit(dict.fromkeys(range(len(PROMPTS)), 1))
        driver.collect()
    driver.collect()
    assert [request.output for request in requests] == alone


def places(outputs: list[ModelRunnerOutput], row: int) -> list[Place]:
    """What the outputs report of one of their rows."""
    found = []
    for output in outputs:
        rows = ints(output.logprob_rows)
        found.append(unpack(output.logprobs)[rows.index(row)])
    return found


def assert_close(found: list[Place], logits: torch.Tensor, chosen: list[int], k: int) -> None:
    """`logits` [N, V] are transformers'. Tokens that tie within rounding may change places."""
    logprobs = logits.double().log_softmax(-1)
    for (entries, rank), row, token in zip(found, logprobs, chosen, strict=True):
        assert entries[0][0] == token
        assert len(entries) == 1 + k
        assert all(abs(value - float(row[each])) < TOLERANCE for each, value in entries)
        best = row.sort(descending=True).values[:k].tolist()
        assert all(abs(value - expected) < TOLERANCE for (_, value), expected in zip(entries[1:], best, strict=True))
        ranks = [int((row >= row[token] + shift).sum()) for shift in (TOLERANCE, -TOLERANCE)]
        assert ranks[0] <= rank <= ranks[1]


def test_L15_logprobs_are_those_of_transformers_whatever_changes_the_logits(
    model: CausalLM, folder: pathlib.Path, reference: Any, alone: list[list[int]]
) -> None:
    """Rows that report 2, 0 and all, beside others; alone and together they are the same to the bit."""
    driver = make_driver(model, folder)
    for slot, (prompt, row) in enumerate(zip(PROMPTS, ROWS, strict=True)):
        driver.join(slot, prompt, row)
    driver.submit({slot: len(prompt) for slot, prompt in enumerate(PROMPTS)})
    outputs = [driver.collect()]
    while len(outputs) < NUM_OUTPUT:
        outputs.append(driver.step(dict.fromkeys(driver.requests, 1)))
    assert [ints(output.logprob_rows) for output in outputs] == [[1, 2, 4]] * NUM_OUTPUT
    for i, k in ((1, 2), (2, 0), (4, LIMITS.vocab_size)):
        with torch.inference_mode():
            logits = reference(torch.tensor([[*PROMPTS[i], *alone[i]]])).logits[0, len(PROMPTS[i]) - 1 : -1]
        assert_close(places(outputs, i), logits, alone[i], k)


def test_nothing_is_reported_where_nobody_asks(driver: Driver) -> None:
    driver.join(0, PROMPTS[1], SamplingRow(presence_penalty=1.0))
    output = driver.step({0: 5})
    assert (output.logprobs, output.logprob_rows, output.prompt_logprobs) == (None, b"", [])


def prompt_places(outputs: list[ModelRunnerOutput], row: int = 0) -> list[Place]:
    """One request's, put together; they must follow each other."""
    found: list[Place] = []
    for output in outputs:
        for part in output.prompt_logprobs:
            if part.row == row:
                assert part.start == len(found) + 1
                found += unpack(part.logprobs)
    return found


def test_L16_prompt_logprobs_are_those_of_transformers(driver: Driver, reference: Any) -> None:
    """Of two prompts in one step, beside one that asks for nothing."""
    driver.join(0, PROMPTS[3], SamplingRow(prompt_logprobs=3))
    driver.join(1, PROMPTS[1])
    driver.join(2, PROMPTS[2], SamplingRow(prompt_logprobs=-1))
    output = driver.step({0: 37, 1: 5, 2: 21})
    assert [part.row for part in output.prompt_logprobs] == [0, 2]
    for row, i, k in ((0, 3, 3), (2, 2, LIMITS.vocab_size)):
        with torch.inference_mode():
            logits = reference(torch.tensor([PROMPTS[i]])).logits[0, :-1]
        assert_close(prompt_places([output], row), logits, list(PROMPTS[i][1:]), k)


@pytest.mark.parametrize("chunk", [1, 3, 16, 36])
def test_L16_whole_as_chunked_also_across_borders(driver: Driver, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk's last position reports the next chunk's first token; nothing lies beyond the prompt."""
    row = SamplingRow(prompt_logprobs=2, logprobs=1)
    driver.join(0, PROMPTS[3], row)
    whole = driver.step({0: 37})
    monkeypatch.setattr(logprobs_module, "_MAX_ELEMENTS", 2 * LIMITS.vocab_size)
    request = driver.join(1, PROMPTS[3], row)
    other = driver.join(2, PROMPTS[0])
    outputs = []
    while not request.output:
        counts = {1: min(chunk, missing(request)), 2: missing(other)}
        row_in_step = sorted(counts, key=lambda slot: counts[slot] > 1).index(1)
        output = driver.step(counts)
        assert all(part.row == row_in_step for part in output.prompt_logprobs)
        outputs.append(output)
    driver.step({1: 1})
    merged = [place for output in outputs for part in output.prompt_logprobs for place in unpack(part.logprobs)]
    starts = [part.start for output in outputs for part in output.prompt_logprobs]
    assert starts == [1 + chunk * i for i in range(len(starts))]
    expected = unpack(whole.prompt_logprobs[0].logprobs)
    assert len(merged) == len(expected) == 36
    for found, place in zip(merged, expected, strict=True):
        assert [token for token, _ in found.entries] == [token for token, _ in place.entries]
        assert np.allclose([value for _, value in found.entries], [value for _, value in place.entries], atol=1e-4)


def test_a_prompt_of_one_token_and_cached_tokens_report_nothing(driver: Driver) -> None:
    driver.join(0, PROMPTS[0], SamplingRow(prompt_logprobs=1))
    assert driver.step({0: 1}).prompt_logprobs == []
    assert driver.step({0: 1}).prompt_logprobs == []


def test_a_request_that_comes_back_reports_its_prompt_again_and_no_more(driver: Driver) -> None:
    driver.join(0, [*PROMPTS[1], 50, 51], SamplingRow(prompt_logprobs=0), num_prompt=5)
    (part,) = driver.step({0: 7}).prompt_logprobs
    assert (part.start, len(ints(part.logprobs.counts))) == (1, 4)
    assert ints(part.logprobs.token_ids) == PROMPTS[1][1:]


def test_L14_a_row_left_without_a_token_is_told_and_reports_nothing(driver: Driver) -> None:
    """Allowed is one token, which is a bad word after itself: the second step has nothing left."""
    driver.join(0, PROMPTS[1], SamplingRow(allowed_token_ids=int32([5]), bad_words=[int32([5, 5])], logprobs=1))
    driver.join(1, PROMPTS[1], SamplingRow(logprobs=1))
    first, second = driver.step({0: 5, 1: 5}), driver.step({0: 1, 1: 1})
    assert (ints(first.token_ids)[0], ints(first.no_token_rows), ints(first.logprob_rows)) == (5, [], [0, 1])
    assert (ints(second.no_token_rows), ints(second.logprob_rows)) == ([0], [1])
    assert isinstance(second.logprobs, Logprobs)
    assert len(unpack(second.logprobs)) == 1


def test_L14_a_bias_on_every_allowed_token_forbids_none(driver: Driver) -> None:
    bias: dict[str, Any] = {"bias_token_ids": int32([5, 6]), "bias_values": np.array([-100, -100], "<f4").tobytes()}
    driver.join(0, PROMPTS[1], SamplingRow(allowed_token_ids=int32([5, 6]), **bias))
    assert set(driver.finish(0, 10)) <= {5, 6}


def test_a_processor_that_fails_ends_its_request_and_no_other(
    driver: Driver, alone: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    driver.join(0, PROMPTS[1], SamplingRow(logits_processors=[("fail", "2")]))
    driver.join(1, PROMPTS[1], SamplingRow(logits_processors=[("absent", "null")]))
    healthy = driver.join(2, PROMPTS[4], ROWS[4])
    with caplog.at_level(logging.ERROR):
        outputs = [driver.step({0: 5, 1: 5, 2: 12}), *(driver.step({0: 1, 1: 1, 2: 1}) for _ in range(2))]
    assert [ints(output.no_token_rows) for output in outputs] == [[1], [1], [0, 1]]
    assert healthy.output == alone[4][:3]
    assert "logits processor fail failed" in caplog.text


def test_L13_neither_spelling_of_a_word_appears(driver: Driver) -> None:
    """A bias makes the word's tokens the best; one spelling is a token, the other a sequence."""
    wanted: dict[str, Any] = {
        "bias_token_ids": int32([61, 32, 33]),
        "bias_values": np.array([60, 50, 55], "<f4").tobytes(),
    }
    driver.join(0, PROMPTS[1], SamplingRow(**wanted))
    assert driver.finish(0, 4) == [61] * 4
    driver.join(0, PROMPTS[1], SamplingRow(**wanted, bad_words=[int32([61]), int32([33, 33]), int32([33, 32, 33])]))
    output = driver.finish(0, 8)
    assert output == [33, 32, 32, 33, 32, 32, 33, 32]

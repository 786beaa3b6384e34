"""Penalties, biases, lists and log probabilities through all three processes, on a tiny model that transformers knows.

What a parameter must do is spelled out in `tests.fakes.plain_sampling`; equalities (alone = batched = preempted) are
held token for token.
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from folovllm import LLM, Logprob, RequestFailedError, RequestOutput, SamplingParams
from tests.fakes.model_folder import NUM_IDS, ids_of
from tests.fakes.oracle import random_prompts
from tests.fakes.plain_sampling import PlainSampling
from tests.integration.conftest import eventually, is_idle
from tests.integration.sampling import GREEDY, PROMPT, RANDOM, ids, run

EOS = 1
TOLERANCE = 2e-4  # of log probabilities: float32, computed in another order of sums


@pytest.fixture(scope="module")
def plain(qwen3_folder: pathlib.Path) -> PlainSampling:
    return PlainSampling(qwen3_folder)


@pytest.fixture(scope="module")
def small_llm(qwen3_folder: pathlib.Path) -> Iterator[LLM]:
    """Chunks of 16 tokens, and so few blocks that requests are preempted."""
    options: dict[str, Any] = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "num_gpu_blocks_override": 14}
    with LLM(qwen3_folder, dtype="float32", cpu_threads=1, **options) as made:
        yield made


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 2.0},
        {"repetition_penalty": 0.5},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5},
        {"presence_penalty": -1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    ],
)
def test_L11_penalties_equal_a_plain_reference_in_any_order(
    qwen3_llm: LLM, plain: PlainSampling, penalties: dict[str, Any]
) -> None:
    prompt = [*PROMPT, *PROMPT[-1:] * 2]
    params, free = SamplingParams(**GREEDY, **penalties), SamplingParams(**GREEDY)
    (alone,) = run(qwen3_llm, prompt, params)
    first = run(qwen3_llm, [prompt, prompt], [params, free])
    last = run(qwen3_llm, [prompt, prompt], [free, params])
    answer = list(alone.outputs[0].token_ids)
    plain.check_greedy(prompt, answer, params)
    assert answer == first[0].outputs[0].token_ids == last[1].outputs[0].token_ids
    assert first[1].outputs[0].token_ids == last[0].outputs[0].token_ids != answer


def test_L08_a_bias_can_force_the_end(qwen3_llm: LLM) -> None:
    params: dict[str, Any] = {"logit_bias": {EOS: 100.0}, "max_tokens": 8, "temperature": 0.0}
    ended, ignored = run(qwen3_llm, [PROMPT] * 2, [SamplingParams(**params), SamplingParams(**params, ignore_eos=True)])
    answer = ended.outputs[0]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason, answer.text) == ([EOS], "stop", None, "")
    assert (ignored.outputs[0].token_ids, ignored.outputs[0].finish_reason) == ([EOS] * 8, "length")


def test_a_bias_adds_to_the_logits(qwen3_llm: LLM, plain: PlainSampling) -> None:
    free = ids(qwen3_llm, **GREEDY)
    params = SamplingParams(**GREEDY, logit_bias={free[0]: -3.0, 66: 1.5, 67: 2.0})
    (output,) = run(qwen3_llm, PROMPT, params)
    plain.check_greedy(PROMPT, output.outputs[0].token_ids, params)
    assert output.outputs[0].token_ids != free


def test_only_allowed_tokens_are_chosen(qwen3_llm: LLM, plain: PlainSampling) -> None:
    allowed = [65, 70, 99, 200]
    params = SamplingParams(**GREEDY, allowed_token_ids=allowed)
    (output,) = run(qwen3_llm, PROMPT, params)
    plain.check_greedy(PROMPT, output.outputs[0].token_ids, params)
    assert set(ids(qwen3_llm, **RANDOM, allowed_token_ids=allowed)) <= set(allowed)


def test_L14_a_bias_on_every_allowed_token_still_picks_one(qwen3_llm: LLM) -> None:
    allowed = [65, 70]
    for settings in (GREEDY, RANDOM):
        chosen = ids(qwen3_llm, **settings, allowed_token_ids=allowed, logit_bias=dict.fromkeys(allowed, -100.0))
        assert set(chosen) <= set(allowed)


def test_L14_a_contradiction_that_arises_later_ends_its_request_with_a_reason(qwen3_llm: LLM) -> None:
    later = SamplingParams(**GREEDY, allowed_token_ids=ids_of("n"), bad_words=["nn"])
    with pytest.raises(RequestFailedError, match="no token"):
        run(qwen3_llm, PROMPT, later)
    assert eventually(lambda: is_idle(qwen3_llm))


def test_L13_bad_words_do_not_appear_and_their_beginnings_may(qwen3_llm: LLM, plain: PlainSampling) -> None:
    letters = ids_of("abcd")
    free = bytes(ids(qwen3_llm, **RANDOM | {"max_tokens": 60}, allowed_token_ids=letters)).decode()
    word = free[10:12]
    for settings in (GREEDY, RANDOM):
        banned = SamplingParams(**settings | {"max_tokens": 60}, allowed_token_ids=letters, bad_words=[word])
        (output,) = run(qwen3_llm, PROMPT, banned)
        assert len(output.outputs[0].text) == 60
        assert word not in output.outputs[0].text
        assert word[0] in output.outputs[0].text
    params = SamplingParams(**GREEDY, bad_words=[word, "e", " "])
    (output,) = run(qwen3_llm, PROMPT, params)
    spelled = [ids_of(text) for text in (word, "e", " ")]
    plain.check_greedy(PROMPT, output.outputs[0].token_ids, params, bad_words=spelled)


def test_L07_min_tokens_holds_against_every_stop(qwen3_llm: LLM, plain: PlainSampling) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, min_tokens=5, logit_bias={EOS: 100.0})
    (output,) = run(qwen3_llm, PROMPT, params)
    answer = list(output.outputs[0].token_ids)
    assert (len(answer), answer[-1], EOS in answer[:-1]) == (6, EOS, False)
    plain.check_greedy(PROMPT, answer, params, stop_ids=[EOS])
    for stop in ({"stop": ["A"]}, {"stop_token_ids": [65]}):
        bias = {65: 100.0, 66: 50.0}
        (output,) = run(qwen3_llm, PROMPT, SamplingParams(**GREEDY, min_tokens=4, logit_bias=bias, **stop))
        text = "AAAA" if "stop" in stop else "BBBB"  # a stop token cannot even be chosen before, a stop string can
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == (text, "stop")


def places(output: RequestOutput) -> list[dict[int, Logprob]]:
    assert output.outputs[0].logprobs is not None
    return output.outputs[0].logprobs


def check_places(made: Sequence[dict[int, Logprob]], rows: Any, tokens: Sequence[int], num_top: int) -> None:
    """Each place holds the token first, then the most likely ones, with transformers' values and right ranks."""
    assert len(made) == len(rows) == len(tokens)
    for place, row, token in zip(made, rows, tokens, strict=True):
        assert next(iter(place)) == token
        for token_id, entry in place.items():
            assert entry.logprob == pytest.approx(float(row[token_id]), abs=TOLERANCE)
        assert place[token].rank in range(
            int((row > row[token] + TOLERANCE).sum()) + 1, int((row >= row[token] - TOLERANCE).sum()) + 1
        )
        top = [entry for entry in place.values() if entry.rank is not None and entry.rank <= num_top]
        best = row.sort(descending=True).values[:num_top]
        assert sorted((entry.logprob for entry in top), reverse=True) == pytest.approx(best.tolist(), abs=TOLERANCE)
        assert len(place) in (num_top, num_top + 1)


@pytest.mark.parametrize("num_top", [0, 3, NUM_IDS])
def test_L15_logprobs_are_transformers(qwen3_llm: LLM, plain: PlainSampling, num_top: int) -> None:
    """Penalties, bias and temperature change what is chosen, and not what is reported."""
    params = SamplingParams(
        **RANDOM | {"temperature": 0.7},
        logprobs=-1 if num_top == NUM_IDS else num_top,
        presence_penalty=1.0,
        logit_bias={65: 3.0},
    )
    (output,) = run(qwen3_llm, PROMPT, params)
    answer = list(output.outputs[0].token_ids)
    rows = plain.logprobs([*PROMPT, *answer])[len(PROMPT) - 1 : -1]
    check_places(places(output), rows, answer, num_top)
    total = sum(float(row[token]) for row, token in zip(rows, answer, strict=True))
    assert output.outputs[0].cumulative_logprob == pytest.approx(total, abs=24 * TOLERANCE)
    shown = [(token, place[token].decoded_token) for token, place in zip(answer, places(output), strict=True)]
    assert all(text == chr(token) for token, text in shown if token < 128)


def test_a_stream_with_log_probabilities_joins_to_the_whole(qwen3_llm: LLM) -> None:
    params = SamplingParams(**RANDOM, logprobs=2, prompt_logprobs=1)
    (whole,) = run(qwen3_llm, PROMPT, params)
    deltas = list(qwen3_llm.stream(PROMPT, params))
    assert [place for delta in deltas for place in delta.outputs[0].logprobs or ()] == places(whole)
    assert deltas[0].prompt_logprobs == whole.prompt_logprobs
    assert len(whole.prompt_logprobs or ()) == len(PROMPT)


def test_L16_prompt_logprobs_with_cache_and_chunks(small_llm: LLM, plain: PlainSampling) -> None:
    (long,) = random_prompts(NUM_IDS, [60], seed=3)
    short = long[:40]
    params = SamplingParams(**GREEDY | {"max_tokens": 2}, prompt_logprobs=1)
    for prompt in (short, short, long):
        (output,) = run(small_llm, prompt, params)
        made = output.prompt_logprobs
        assert made is not None
        assert made[0] is None
        check_places([place for place in made if place is not None], plain.logprobs(prompt)[:-1], prompt[1:], 1)
        assert (len(output.outputs), len(output.outputs[0].token_ids), output.num_cached_tokens) == (1, 2, 0)
    (output,) = run(small_llm, long, SamplingParams(**GREEDY | {"max_tokens": 2}))
    assert output.num_cached_tokens == 48, "what others computed is still found"


def test_L17_prompt_logprobs_without_an_answer(qwen3_llm: LLM, plain: PlainSampling) -> None:
    (output,) = run(qwen3_llm, PROMPT, SamplingParams(max_tokens=0, prompt_logprobs=0, n=2))
    assert [list(answer.token_ids) for answer in output.outputs] == [[], []]
    made = [place for place in output.prompt_logprobs or () if place is not None]
    check_places(made, plain.logprobs(PROMPT)[:-1], PROMPT[1:], 0)


MIXED: tuple[dict[str, Any], ...] = (
    {},
    {"n": 3, "seed": 7},
    {"presence_penalty": 1.0, "seed": 1},
    {"repetition_penalty": 1.5, "seed": 2, "logprobs": 2},
    {"frequency_penalty": -1.0, "temperature": 0.0},
    {"logit_bias": {70: 4.0}, "seed": 3, "prompt_logprobs": 1},
    {"allowed_token_ids": list(range(60, 90)), "seed": 4, "top_k": 5},
    {"bad_words": ["a", "be"], "seed": 5, "top_p": 0.8, "min_p": 0.01},
    {"min_tokens": 9, "ignore_eos": False, "logit_bias": {EOS: 6.0}, "seed": 6},
    {"temperature": 0.0, "logprobs": 0},
)


def outcome(output: RequestOutput) -> list[tuple[list[int], str | None]]:
    return [(list(answer.token_ids), answer.finish_reason) for answer in output.outputs]


def test_L09_alone_is_batched_is_preempted_whatever_is_mixed(qwen3_llm: LLM, small_llm: LLM) -> None:
    prompts = random_prompts(NUM_IDS, [5, 16, 33, 20, 40, 17, 8, 31, 25, 48])
    params = [SamplingParams(**RANDOM | {"max_tokens": 40} | mixed) for mixed in MIXED]
    together = run(qwen3_llm, prompts, params)
    again = run(qwen3_llm, prompts[::-1], params[::-1])[::-1]
    chunked = run(small_llm, prompts, params)
    assert small_llm.get_stats().num_preemptions_total > 0
    for i, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
        (alone,) = run(qwen3_llm, prompt, own)
        assert outcome(alone) == outcome(together[i]) == outcome(again[i]) == outcome(chunked[i]), MIXED[i]
        for other in (together[i], chunked[i]):
            _check_same_logprobs(alone, other)
    assert len(set(map(str, outcome(together[1])))) == 3, "n answers differ"
    assert is_idle(qwen3_llm)
    assert is_idle(small_llm)


def _check_same_logprobs(one: RequestOutput, other: RequestOutput) -> None:
    for mine, theirs in (
        (one.outputs[0].logprobs, other.outputs[0].logprobs),
        (one.prompt_logprobs, other.prompt_logprobs),
    ):
        assert (mine is None) == (theirs is None)
        for place, same in zip(mine or (), theirs or (), strict=True):
            assert (place is None) == (same is None)
            for token_id, entry in (place or {}).items():
                assert same is not None
                assert same[token_id].logprob == pytest.approx(entry.logprob, abs=TOLERANCE)

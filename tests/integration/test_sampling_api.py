"""What requests may ask for besides their numbers, through all three processes, on a tiny model."""

from typing import Any

import pytest

from folovllm import LLM, RequestError, SamplingParams
from tests.fakes.model_folder import NUM_IDS, ids_of
from tests.fakes.oracle import random_prompts
from tests.integration.conftest import eventually, is_idle
from tests.integration.sampling import GREEDY, PROMPT, ids, run


def cached(llm: LLM, prompt: Any, **params: Any) -> int | None:
    (output,) = run(llm, prompt, SamplingParams(**GREEDY | {"max_tokens": 1}, **params))
    return output.num_cached_tokens


def test_L14_a_contradiction_known_at_once_is_refused(qwen3_llm: LLM) -> None:
    with pytest.raises(RequestError, match="leave no token to begin with") as caught:
        run(qwen3_llm, PROMPT, SamplingParams(allowed_token_ids=ids_of("n"), bad_words=["n"]))
    assert caught.value.field == "allowed_token_ids"
    assert is_idle(qwen3_llm)


def test_a_time_limit_ends_the_answer_with_what_it_has(qwen3_llm: LLM) -> None:
    (output, other) = run(
        qwen3_llm,
        [PROMPT, PROMPT],
        [
            SamplingParams(ignore_eos=True, max_tokens=100, timeout_s=1e-4),
            SamplingParams(ignore_eos=True, max_tokens=9),
        ],
    )
    assert output.outputs[0].finish_reason == "timeout"
    assert len(output.outputs[0].token_ids) < 100
    assert (len(other.outputs[0].token_ids), other.outputs[0].finish_reason) == (9, "length")
    assert eventually(lambda: is_idle(qwen3_llm))


def test_a_prompt_that_is_too_long_can_be_truncated(qwen3_llm: LLM) -> None:
    (long,) = random_prompts(NUM_IDS, [300], seed=9)
    with pytest.raises(RequestError, match="the prompt has 300 tokens"):
        run(qwen3_llm, long, SamplingParams(**GREEDY))
    params = SamplingParams(**GREEDY, truncate_prompt_tokens=100)
    (output,) = run(qwen3_llm, long, params)
    assert output.prompt_token_ids == long[-100:]
    assert list(output.outputs[0].token_ids) == ids(qwen3_llm, long[-100:], **GREEDY)
    (output,) = run(qwen3_llm, long, SamplingParams(**GREEDY, truncate_prompt_tokens=-1))
    assert (len(output.prompt_token_ids), len(output.outputs[0].token_ids)) == (127, 1)


def test_token_ids_without_text(qwen3_llm: LLM) -> None:
    (output,) = run(qwen3_llm, PROMPT, SamplingParams(**GREEDY, detokenize=False))
    assert (output.outputs[0].text, list(output.outputs[0].token_ids)) == ("", ids(qwen3_llm, **GREEDY))


def test_L19_what_the_prefix_cache_shares_and_forgets(qwen3_llm: LLM) -> None:
    (prompt,) = random_prompts(NUM_IDS, [40], seed=11)
    assert qwen3_llm.reset_prefix_cache()
    assert cached(qwen3_llm, prompt) == 0
    assert cached(qwen3_llm, prompt) == 32
    assert cached(qwen3_llm, prompt, skip_reading_prefix_cache=True) == 0
    assert cached(qwen3_llm, prompt, prompt_logprobs=0) == 0
    assert cached(qwen3_llm, {"prompt_token_ids": prompt, "cache_salt": "mine"}) == 0
    assert cached(qwen3_llm, {"prompt_token_ids": prompt, "cache_salt": "mine"}) == 32
    assert qwen3_llm.reset_prefix_cache()
    assert cached(qwen3_llm, prompt) == 0
    assert ids(qwen3_llm, prompt, **GREEDY) == ids(qwen3_llm, prompt, **GREEDY, skip_reading_prefix_cache=True)


def test_unknown_logits_processors_are_refused_by_name(qwen3_llm: LLM) -> None:
    with pytest.raises(RequestError, match="'cool' is not loaded") as caught:
        run(qwen3_llm, PROMPT, SamplingParams(logits_processors=["cool"]))
    assert caught.value.field == "logits_processors"

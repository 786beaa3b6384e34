"""Every parameter as the number that the worker gets, and what only the vocabulary can refuse."""

import struct
from typing import Any

import pytest
from tokenizers import models

from folovllm.common.errors import RequestError
from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend import int32
from folovllm.frontend.generation_defaults import ModelDefaults
from folovllm.frontend.sampling_row import bad_word_ids, prompt_only_row, sampling_row
from folovllm.frontend.tokenizer import Tokenizer
from tests.fakes.tokenizers_ import (
    byte_level_backend,
    case_tokenizer,
    llama3_like_backend,
    sentencepiece_like_tokenizer,
)

NUM_IDS = 151669
IM_END = 151645


def row(tokenizer: Tokenizer | None = None, defaults: ModelDefaults | None = None, **params: Any) -> SamplingRow:
    return sampling_row(
        SamplingParams(**params),
        defaults or ModelDefaults(),
        stop_token_ids=[IM_END],
        tokenizer=tokenizer or case_tokenizer(),
        num_ids=NUM_IDS,
    )


def merging_tokenizer() -> Tokenizer:
    """`bad` is one token, ` bad` another, ` badly` one and `badly` two: as in Qwen3, lengths differ with the blank."""
    backend = byte_level_backend({})
    pieces = ["b", "a", "d", "l", "y", "Ġ", "ba", "bad", "ly", "Ġbad", "Ġbadly"]
    merges = [("b", "a"), ("ba", "d"), ("l", "y"), ("Ġ", "bad"), ("Ġbad", "ly")]
    backend.model = models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    return Tokenizer(backend, config={})


def test_plain_parameters_are_plain_numbers() -> None:
    assert row() == SamplingRow(temperature=1.0, stop_token_ids=int32.pack([IM_END]))


def test_penalties_biases_and_lists_also_for_greedy_requests() -> None:
    params: dict[str, Any] = {
        "presence_penalty": 1,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.25,
        "logit_bias": {5: 1.5, 3: -1000, 4: 1e30},
        "allowed_token_ids": [5, 3, 5],
        "bad_words": ["x"],
        "min_tokens": 2,
        "logprobs": 0,
        "prompt_logprobs": -1,
        "logits_processors": {"cool": 2},
    }
    for temperature in (0, 0.5):
        made = row(temperature=temperature, **params)
        assert made.temperature == temperature
        assert (made.presence_penalty, made.frequency_penalty, made.repetition_penalty) == (1.0, -0.5, 1.25)
        assert int32.unpack(made.bias_token_ids) == [5, 3, 4]
        assert struct.unpack("<3f", made.bias_values) == (1.5, -100.0, 100.0)
        assert int32.unpack(made.allowed_token_ids) == [5, 3]
        assert [int32.unpack(word) for word in made.bad_words] == [[87]]
        assert (made.min_tokens, made.logprobs, made.prompt_logprobs) == (2, 0, -1)
        assert made.logits_processors == [("cool", "2")]


def test_L39_the_models_repetition_penalty_counts_where_none_is_given() -> None:
    defaults = ModelDefaults(repetition_penalty=1.1, temperature=0.6)
    assert row(defaults=defaults).repetition_penalty == 1.1
    assert row(defaults=defaults, repetition_penalty=1.0).repetition_penalty == 1.0


@pytest.mark.parametrize("given, expected", [(1e-300, 1e-6), (1e300, 1e6), (1, 1.0)])
def test_L10_extreme_penalties_stay_finite(given: float, expected: float) -> None:
    assert row(repetition_penalty=given).repetition_penalty == expected


@pytest.mark.parametrize("asked, sent", [(None, None), (0, 0), (5, 5), (-1, -1), (8, -1), (1000, -1)])
def test_L12_more_log_probabilities_than_tokens_are_all(asked: int | None, sent: int | None) -> None:
    params = SamplingParams(logprobs=asked, prompt_logprobs=asked)
    made = sampling_row(params, ModelDefaults(), stop_token_ids=[], tokenizer=None, num_ids=8)
    assert (made.logprobs, made.prompt_logprobs) == (sent, sent)
    assert prompt_only_row(made) == SamplingRow(prompt_logprobs=sent)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"logit_bias": {5: 1.0, NUM_IDS: 5.0}}, "logit_bias: 151669 is no token of this model: ids are 0 to 151668"),
        ({"allowed_token_ids": [1, 151936]}, r"allowed_token_ids\[1\]=151936 is no token of this model"),
    ],
)
def test_L12_ids_beyond_the_vocabulary_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        row(**params)
    assert caught.value.field in params


def test_L13_both_spellings_of_a_bad_word_are_banned() -> None:
    tokenizer = merging_tokenizer()
    assert bad_word_ids(["bad"], tokenizer) == [[7], [9]]
    assert bad_word_ids(["badly"], tokenizer) == [[7, 8], [10]], "also where they differ in length"
    assert bad_word_ids(["  bad", "bad"], tokenizer) == [[7], [9]]


def test_L13_a_spelling_that_bans_nothing_more_is_left_out() -> None:
    assert bad_word_ids(["x"], case_tokenizer()) == [[87]], "a blank and x is banned with x"
    piece = sentencepiece_like_tokenizer()
    assert bad_word_ids(["a"], piece) == [[piece.token_id("a")]]


@pytest.mark.parametrize("word, ids", [(" ", [220]), ("\n", [198]), ("  ", [220, 220]), ("\n\n", [198, 198])])
def test_L13_blanks_are_banned_as_they_are(word: str, ids: list[int]) -> None:
    assert bad_word_ids([word], case_tokenizer()) == [ids]


def test_L13_no_special_token_is_put_in_front() -> None:
    tokenizer = Tokenizer(llama3_like_backend(), config={})
    (ids,) = bad_word_ids(["ab"], tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "ab"


@pytest.mark.parametrize(
    "words, message",
    [
        (["a\ud800"], "lone surrogate"),
        ([f"{i:0200d}" for i in range(10)], "bad_words are 2000 tokens in all spellings; at most 1024 are allowed"),
    ],
)
def test_bad_words_that_cannot_be_spelled_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        bad_word_ids(words, case_tokenizer())


def test_bad_words_need_a_tokenizer() -> None:
    with pytest.raises(RequestError, match="no tokenizer") as caught:
        bad_word_ids(["x"], None)
    assert caught.value.field == "bad_words"
    assert bad_word_ids([], None) == []


@pytest.mark.parametrize(
    "params, cause",
    [
        ({"allowed_token_ids": [87], "bad_words": ["x"]}, "bad_words bans them all"),
        ({"allowed_token_ids": [IM_END], "min_tokens": 1}, "min_tokens bans those that end the answer"),
        (
            {"allowed_token_ids": [IM_END, 87], "min_tokens": 1, "bad_words": ["x"]},
            "min_tokens bans those that end the answer and bad_words the others",
        ),
    ],
)
def test_L14_a_contradiction_is_refused_at_once(params: dict[str, Any], cause: str) -> None:
    with pytest.raises(RequestError, match=f"leave no token to begin with: {cause}$") as caught:
        row(**params)
    assert caught.value.field == "allowed_token_ids"


@pytest.mark.parametrize(
    "params",
    [
        {"allowed_token_ids": [87, 64], "bad_words": ["x"]},
        {"allowed_token_ids": [87, 64], "bad_words": ["xa"]},
        {"allowed_token_ids": [IM_END]},
        {"allowed_token_ids": [87], "logit_bias": {87: -100}},
    ],
)
def test_L14_what_leaves_a_token_is_no_contradiction(params: dict[str, Any]) -> None:
    assert row(**params).allowed_token_ids

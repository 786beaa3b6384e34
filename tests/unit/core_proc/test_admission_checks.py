"""Every field of a request: what is refused, with which field and words, and what passes."""

import math

import msgspec
import numpy as np
import pytest

from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.messages.frontend_core import EngineCoreRequest
from folovllm.common.sampling_params import MAX_PROCESSOR_ARGUMENT_CHARACTERS, MAX_TIMEOUT_S
from folovllm.core_proc.admission_checks import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_CACHE_SALT_CHARACTERS,
    Refused,
    RequestChecks,
)

VOCABULARY = 100
NAN = float("nan")


def int32(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def float32(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def make_checks(vocabulary: int = VOCABULARY, max_num_seqs: int = 4) -> RequestChecks:
    return RequestChecks(
        num_valid_token_ids=vocabulary, max_num_seqs=max_num_seqs, logits_processors=("a:first", "b:second")
    )


def make_message(sampling: SamplingRow | None = None, **fields: object) -> EngineCoreRequest:
    values: dict[str, object] = {"prompt_token_ids": int32(1, 2), "stream": True, **fields}
    return EngineCoreRequest(
        number=1,
        request_id="r",
        sampling=SamplingRow() if sampling is None else sampling,
        max_tokens=5,
        **values,  # type: ignore[arg-type]
    )


def refused(message: EngineCoreRequest, checks: RequestChecks | None = None) -> Refused:
    with pytest.raises(Refused) as raised:
        (checks or make_checks()).check(message)
    return raised.value


def with_sampling(**fields: object) -> EngineCoreRequest:
    return make_message(SamplingRow(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [NAN, math.inf, -0.1]),
        ("top_k", [-1, 2**31]),
        ("top_p", [0.0, -1.0, 1.01, NAN]),
        ("min_p", [-0.1, 2.0, NAN]),
        ("seed", [2**63]),
        ("sample_index", [1, -1]),
        ("min_tokens", [-1, 2**31, 2**64 - 1]),
        ("presence_penalty", [-2.01, 2.01, NAN]),
        ("frequency_penalty", [-2.01, 2.01, NAN]),
        ("repetition_penalty", [0.0, -1.0, 5e-324, 1e300, NAN, math.inf]),  # also those that float32 cannot hold
        ("stop_token_ids", [b"abc", int32(-1), int32(VOCABULARY), int32(*[0] * 1025)]),
        ("allowed_token_ids", [b"abc", int32(1, -1), int32(VOCABULARY)]),
        ("bias_token_ids", [b"abcde"]),
        ("bad_words", [[b""], [int32(1), b""], [b"abc"], [int32(1, VOCABULARY)], [int32(-1)]]),
        ("logprobs", [-2, VOCABULARY + 1, 2_000_000_000]),
        ("prompt_logprobs", [-2, VOCABULARY + 1]),
        ("logits_processors", [[("c:third", "{}")], [("", "{}")], [("a:first", "{")], [("a:first", "")]]),
    ],
)
def test_L10_L12_sampling_values_out_of_range(field: str, values: list[object]) -> None:
    for value in values:
        error = refused(with_sampling(**{field: value}))
        assert error.field == field, value
        assert str(error)


@pytest.mark.parametrize(
    ("ids", "values", "field", "text"),
    [
        (int32(1), b"", "bias_values", "0 bytes of float32 for 1 token ids"),
        (int32(1), float32(1.0, 2.0), "bias_values", "8 bytes of float32 for 1 token ids"),
        (b"", float32(1.0), "bias_values", "4 bytes of float32 for 0 token ids"),
        (int32(1, VOCABULARY), float32(1.0, 2.0), "bias_token_ids", "token id 100 at position 1"),
        (int32(3, 1, 3), float32(1.0, 2.0, 3.0), "bias_token_ids", "twice"),
        (int32(3), float32(NAN), "bias_values", "not finite"),
        (int32(*range(1025)), float32(*[0.0] * 1025), "bias_token_ids", "at most 1024"),
        (int32(3, 4), float32(0.0, math.inf), "bias_values", "not finite"),
    ],
)
def test_L12_biases_are_finite_numbers_for_known_tokens_once_each(
    ids: bytes, values: bytes, field: str, text: str
) -> None:
    error = refused(with_sampling(bias_token_ids=ids, bias_values=values))
    assert error.field == field
    assert text in str(error)


def test_L13_bad_words_are_bounded_in_number_and_length() -> None:
    assert "at most 4096" in str(refused(with_sampling(bad_words=[int32(1)] * (MAX_BAD_WORDS + 1))))
    long_word = int32(*[1] * (MAX_BAD_WORD_TOKENS // 2 + 1))
    assert "at most 65536" in str(refused(with_sampling(bad_words=[long_word] * 2)))
    make_checks().check(with_sampling(bad_words=[int32(1)] * MAX_BAD_WORDS))


@pytest.mark.parametrize("number", [-1, 0, VOCABULARY])
def test_L15_every_number_of_log_probabilities_up_to_the_vocabulary_passes(number: int) -> None:
    make_checks().check(with_sampling(logprobs=number, prompt_logprobs=number))


def test_log_probabilities_of_tokens_need_a_stream() -> None:
    error = refused(make_message(SamplingRow(logprobs=0), stream=False))
    assert error.field == "logprobs"
    assert "streaming" in str(error)
    make_checks().check(make_message(SamplingRow(prompt_logprobs=0), stream=False))


def test_log_probabilities_fit_into_a_frame() -> None:
    large = make_checks(vocabulary=2**17, max_num_seqs=256)
    assert "for 256 requests that run at once would take" in str(refused(with_sampling(logprobs=-1), large))
    large.check(with_sampling(logprobs=2**15))
    prompt = int32(*[0] * 200)
    error = refused(make_message(SamplingRow(prompt_logprobs=-1), prompt_token_ids=prompt), large)
    assert (error.field, "200 prompt tokens" in str(error)) == ("prompt_logprobs", True)
    large.check(make_message(SamplingRow(prompt_logprobs=1000), prompt_token_ids=prompt))


def test_processors_that_are_not_loaded_are_refused_with_those_that_are() -> None:
    error = refused(with_sampling(logits_processors=[("a:first", "1"), ("x" * 1000, "{}")]))
    assert "known: a:first, b:second" in str(error)
    assert len(str(error)) < 200
    none = RequestChecks(num_valid_token_ids=1000, max_num_seqs=1, logits_processors=())
    assert "known: none" in str(refused(with_sampling(logits_processors=[("a:first", "1")]), none))
    assert "at most 16" in str(refused(with_sampling(logits_processors=[("a:first", "1")] * 17)))
    argument = f'"{"x" * MAX_PROCESSOR_ARGUMENT_CHARACTERS}"'
    assert "65536 are allowed" in str(refused(with_sampling(logits_processors=[("a:first", argument)])))
    deep = "[" * 60_000
    assert "no JSON" in str(refused(with_sampling(logits_processors=[("a:first", deep)])))


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, NAN, math.inf, MAX_TIMEOUT_S + 1])
def test_a_time_limit_is_above_zero_and_bounded(timeout_s: float) -> None:
    assert refused(make_message(timeout_s=timeout_s)).field == "timeout_s"


def test_a_cache_salt_is_bounded() -> None:
    make_checks().check(make_message(cache_salt="x" * MAX_CACHE_SALT_CHARACTERS))
    assert refused(make_message(cache_salt="x" * (MAX_CACHE_SALT_CHARACTERS + 1))).field == "cache_salt"


def test_prompt_ids_are_known_tokens() -> None:
    assert "token id 100 at position 1" in str(refused(make_message(prompt_token_ids=int32(5, 100))))
    assert "3 bytes" in str(refused(make_message(prompt_token_ids=b"abc")))


def test_everything_at_once_passes() -> None:
    sampling = SamplingRow(
        temperature=1e300,
        top_k=2**31 - 1,
        top_p=1e-9,
        min_p=1.0,
        seed=-(2**63),
        min_tokens=2**31 - 1,
        stop_token_ids=int32(*range(VOCABULARY)),
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        repetition_penalty=1e-30,
        bias_token_ids=int32(0, VOCABULARY - 1),
        bias_values=float32(-100.0, 3e38),
        allowed_token_ids=int32(4, 4, 5),
        bad_words=[int32(1), int32(1, 2, 3)],
        logprobs=5,
        prompt_logprobs=0,
        logits_processors=[("b:second", '{"k": [1, 2]}'), ("a:first", "null")],
    )
    message = make_message(sampling, timeout_s=0.001, cache_salt="tenant")
    make_checks().check(message)
    make_checks().check(msgspec.structs.replace(message, timeout_s=None))

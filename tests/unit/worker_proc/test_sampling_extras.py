"""What a request asks for as arrays: what fits, what is passed over, what is refused by name."""

from typing import Any

import numpy as np
import pytest

from folovllm.common.errors import ProtocolError
from folovllm.common.messages.core_worker import SamplingRow
from folovllm.worker_proc.sampling_extras import SamplingExtras, check_sampling, read_extras
from tests.fakes.fake_core import int32

NUM_IDS = 10


def float32(values: list[float]) -> bytes:
    return np.array(values, "<f4").tobytes()


def read(**fields: Any) -> SamplingExtras | None:
    return read_extras(SamplingRow(**fields), NUM_IDS, "request")


def extras(**fields: Any) -> SamplingExtras:
    made = read(**fields)
    assert made is not None
    return made


def test_a_row_of_numbers_alone_asks_for_nothing() -> None:
    row = {"temperature": 0.7, "top_k": 4, "top_p": 0.5, "min_p": 0.1, "min_tokens": 3, "stop_token_ids": int32([1])}
    assert read(**row) is None


def test_every_field_arrives() -> None:
    made = extras(
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        repetition_penalty=1.5,
        bias_token_ids=int32([4, 2]),
        bias_values=float32([1.5, -2.5]),
        allowed_token_ids=int32([1, 2, 4]),
        bad_words=[int32([3]), int32([1, 2])],
        logprobs=0,
        prompt_logprobs=-1,
        logits_processors=[("a:b", '{"k": [1, null]}'), ("c:d", "null")],
    )
    assert (made.presence_penalty, made.frequency_penalty, made.repetition_penalty) == (0.5, -0.25, 1.5)
    assert (made.bias_ids.tolist(), made.bias_values.tolist()) == ([4, 2], [1.5, -2.5])
    assert made.allowed_ids is not None
    assert made.allowed_ids.tolist() == [1, 2, 4]
    assert [word.tolist() for word in made.bad_words] == [[3], [1, 2]]
    assert (made.logprobs, made.prompt_logprobs) == (0, -1)
    assert made.processors == [("a:b", {"k": [1, None]}), ("c:d", None)]


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 0.9},
        {"bias_token_ids": int32([1]), "bias_values": float32([0.5])},
        {"allowed_token_ids": int32([1])},
        {"bad_words": [int32([1])]},
        {"logprobs": 0},
        {"logits_processors": [("a:b", "null")]},
    ],
)
def test_each_field_by_itself_concerns_sampling(fields: dict[str, Any]) -> None:
    assert extras(**fields).concerns_sampling


def test_prompt_logprobs_do_not_concern_sampling() -> None:
    assert not extras(prompt_logprobs=0).concerns_sampling


def test_ids_without_a_logit_are_passed_over() -> None:
    made = extras(
        bias_token_ids=int32([9, 10, -1]),
        bias_values=float32([1, 2, 3]),
        allowed_token_ids=int32([10, 9, 2**31 - 1]),
        bad_words=[int32([1, 10]), int32([10]), int32([9])],
    )
    assert (made.bias_ids.tolist(), made.bias_values.tolist()) == ([9], [1.0])
    assert made.allowed_ids is not None
    assert made.allowed_ids.tolist() == [9]
    assert [word.tolist() for word in made.bad_words] == [[9]]


def test_allowing_nothing_that_exists_is_not_allowing_all() -> None:
    allowed = extras(allowed_token_ids=int32([10])).allowed_ids
    assert allowed is not None
    assert len(allowed) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"presence_penalty": float("nan")}, "request: presence_penalty=nan must be finite"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty=inf must be finite"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be finite and > 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty=nan must be"),
        ({"bias_token_ids": int32([1]), "bias_values": b""}, "bias_values has 0 bytes for 1 float32"),
        ({"bias_values": float32([1])}, "bias_values has 4 bytes for 0 float32"),
        ({"bias_token_ids": b"123"}, "bias_token_ids: 3 bytes are no whole number"),
        ({"bias_token_ids": int32([1, 1]), "bias_values": float32([1, 2])}, "a token occurs twice"),
        ({"bias_token_ids": int32([1]), "bias_values": float32([float("inf")])}, "bias_values must be finite"),
        ({"allowed_token_ids": b"1"}, "allowed_token_ids: 1 bytes"),
        ({"bad_words": [b""]}, "bad_words: a sequence is empty"),
        ({"bad_words": [b"12345"]}, "bad_words: 5 bytes"),
        ({"logprobs": -2}, "logprobs=-2 must be ≥ -1"),
        ({"prompt_logprobs": 2**31}, "prompt_logprobs=2147483648 must be"),
        ({"logits_processors": [("a:b", "{")]}, "the argument of a:b is no JSON"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        read(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be finite and ≥ 0"),
        ({"top_k": -1}, "top_k=-1 must be"),
        ({"top_p": 0.0}, "top_p=0.0 must lie"),
        ({"min_p": 1.5}, "min_p=1.5 must lie"),
        ({"sample_index": -1}, "sample_index=-1 must be"),
        ({"min_tokens": 2**31}, "min_tokens=2147483648 must be"),
    ],
)
def test_numbers_of_every_row_are_checked(fields: dict[str, Any], message: str) -> None:
    check_sampling(SamplingRow(), "request")
    with pytest.raises(ProtocolError, match=message):
        check_sampling(SamplingRow(**fields), "request")

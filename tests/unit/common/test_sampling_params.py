"""Sampling parameters are checked when they are made; the error names field, value and range, and stays short."""

import math
import time

import pytest

from folovllm.common.errors import RequestError
from folovllm.common.sampling_params import SamplingParams


def refused(**fields: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**fields)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 250
    return caught.value


def test_defaults_leave_sampling_to_the_model() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.seed) == (None,) * 5
    assert (params.n, params.max_tokens, params.min_tokens) == (1, 16, 0)


@pytest.mark.parametrize("temperature", [0, 1e-5, 1e-30, 5e-324, 1.0, 1e308])
def test_L10_small_and_large_temperatures_are_let_in(temperature: float) -> None:
    assert SamplingParams(temperature=temperature).temperature == temperature


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("temperature", "0.5"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", -1),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", 2),
        ("min_p", -0.5),
        ("top_k", -2),
        ("top_k", 2**31),
        ("top_k", 1.5),
        ("seed", 2**63),
        ("seed", "7"),
        ("repetition_penalty", 0),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("min_tokens", 2.0),
        ("ignore_eos", 1),
        ("skip_special_tokens", "yes"),
        ("include_stop_str_in_output", None),
    ],
)
def test_L10_values_out_of_range_name_field_and_value(field: str, value: object) -> None:
    error = refused(**{field: value})
    assert error.field == field
    assert field in str(error)


def test_L10_the_range_is_told() -> None:
    assert "between 0.0 and 1.0" in str(refused(min_p=2))
    assert "greater than 0 and at most 1" in str(refused(top_p=0))


@pytest.mark.parametrize(
    ("value", "expected"), [(None, []), ("x", ["x"]), (["a", "b"], ["a", "b"]), (("a",), ["a"]), ([], [])]
)
def test_L06_every_form_of_stop(value: object, expected: list[str]) -> None:
    assert SamplingParams(stop=value).stop_list() == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "stop[0] is empty"),
        (["a", ""], "stop[1] is empty"),
        (["x"] * 500_000, "stop has 500000 strings; at most 256"),
        ("x" * 1_000_000, "stop[0] has 1000000 characters; at most 4096"),
        ([5], "stop[0] must be a string, not int"),
        (5, "stop must be a string or a list of strings, not int"),
        ({"a": 1}, "not dict"),
    ],
)
def test_L06_stops_that_cannot_be_are_refused_at_once(value: object, message: str) -> None:
    begun = time.perf_counter()
    error = refused(stop=value)
    assert time.perf_counter() - begun < 0.5
    assert error.field == "stop"
    assert message in str(error)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([-1], "stop_token_ids[0]=-1 must be a token id"),
        ([1, True], "stop_token_ids[1]=True"),
        (["7"], "stop_token_ids[0]='7'"),
        ([1.0], "stop_token_ids[0]=1.0"),
        (7, "must be a list of token ids, not int"),
        (list(range(1025)), "stop_token_ids has 1025 ids; at most 1024"),
        (["x" * 10_000], "..."),
    ],
)
def test_L12_stop_token_ids_are_checked(value: object, message: str) -> None:
    error = refused(stop_token_ids=value)
    assert error.field == "stop_token_ids"
    assert message in str(error)


def test_L07_min_tokens_above_max_tokens_is_refused() -> None:
    error = refused(min_tokens=5, max_tokens=4)
    assert error.field == "min_tokens"
    assert "min_tokens=5 is greater than max_tokens=4" in str(error)
    assert SamplingParams(min_tokens=5, max_tokens=None).min_tokens == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("repetition_penalty", 1.1),
        ("logit_bias", {5: 1.0}),
        ("allowed_token_ids", [1]),
        ("bad_words", ["x"]),
        ("logprobs", 0),
        ("prompt_logprobs", 1),
        ("structured_outputs", {"json": {}}),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field: str, value: object) -> None:
    error = refused(**{field: value})
    assert error.field == field
    assert "not supported" in str(error)


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1)  # type: ignore[call-arg]

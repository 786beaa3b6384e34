"""Sampling parameters are checked when they are made; the error names field, value and range, and stays short."""

import json
import math
import time

import pytest

from folovllm.common.errors import RequestError
from folovllm.common.sampling_params import _CHECKS, SamplingParams
from folovllm.common.structured_outputs import StructuredOutputsParams


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
    begun = time.thread_time()
    error = refused(stop=value)
    assert time.thread_time() - begun < 0.5
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
        ("presence_penalty", 2),
        ("frequency_penalty", -2.0),
        ("repetition_penalty", 1e-30),
        ("logit_bias", {0: -100, 151668: 5.5}),
        ("logit_bias", {7: 1e9}),
        ("logit_bias", {}),
        ("allowed_token_ids", [1, 1, 0]),
        ("bad_words", ["x", " "]),
        ("bad_words", []),
        ("logprobs", -1),
        ("logprobs", 0),
        ("prompt_logprobs", 1024),
        ("truncate_prompt_tokens", -1),
        ("truncate_prompt_tokens", 1),
        ("timeout_s", 0.001),
        ("skip_reading_prefix_cache", True),
        ("structured_outputs", StructuredOutputsParams(json_object=True)),
        ("logits_processors", ["a", "b"]),
        ("logits_processors", {"a": {"ids": [1, None, "x"]}}),
    ],
)
def test_values_in_range_are_kept_as_given(field: str, value: object) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("presence_penalty", 2.1, "presence_penalty=2.1 must be a finite number between -2.0 and 2.0"),
        ("presence_penalty", None, "must not be None"),
        ("frequency_penalty", math.nan, "frequency_penalty=nan must be a finite number between -2.0 and 2.0"),
        ("frequency_penalty", "1", "must be a number"),
        ("repetition_penalty", 0.0, "must be greater than 0"),
        ("repetition_penalty", -1, "between 0.0 and inf"),
        ("repetition_penalty", math.inf, "must be a finite number"),
        ("temperature", 10**400, "must be a finite number"),
        ("n", None, "must not be None"),
        ("logit_bias", [5], "must be a dict, token id → number, not list"),
        ("logit_bias", {-1: 1.0}, "logit_bias's key=-1 must be a token id"),
        ("logit_bias", {"AI": -100}, "logit_bias's key='AI' must be a token id"),
        ("logit_bias", {True: 1.0}, "logit_bias's key=True"),
        ("logit_bias", {5: math.nan}, "logit_bias[5]=nan must be a finite number from -100 to 100"),
        ("logit_bias", {5: -math.inf}, "logit_bias[5]=-inf"),
        ("logit_bias", {5: 10**400}, "must be a finite number"),
        ("logit_bias", {5: None}, "logit_bias[5]=None"),
        ("logit_bias", dict.fromkeys(range(1025), 1.0), "has 1025 tokens; at most 1024"),
        ("allowed_token_ids", [], "has 0 ids; at least 1"),
        ("allowed_token_ids", 5, "must be a list of token ids, not int"),
        ("allowed_token_ids", [5, -2], "allowed_token_ids[1]=-2"),
        ("bad_words", "word", "must be a list of strings, not str"),
        ("bad_words", [""], "bad_words[0] is empty"),
        ("bad_words", ["a", 5], "bad_words[1] must be a string, not int"),
        ("bad_words", ["x"] * 129, "has 129 strings; at most 128"),
        ("bad_words", ["x" * 257], "bad_words[0] has 257 characters; at most 256"),
        ("logprobs", -2, "must lie between -1 and 1024"),
        ("logprobs", 2_000_000_000, "must lie between -1 and 1024"),
        ("logprobs", True, "must be a whole number"),
        ("prompt_logprobs", 1025, "must lie between -1 and 1024"),
        ("truncate_prompt_tokens", 0, "must be at least 1, or -1"),
        ("truncate_prompt_tokens", -2, "must lie between -1 and"),
        ("timeout_s", 0, "must be greater than 0"),
        ("timeout_s", -1.0, "between 0.0 and 604800.0"),
        ("timeout_s", math.inf, "must be a finite number"),
        ("detokenize", None, "must be True or False"),
        ("skip_reading_prefix_cache", 1, "must be True or False"),
        ("structured_outputs", {"json": {}}, "must be a StructuredOutputsParams, not dict"),
        ("logits_processors", "name", "must be a list of names or a dict of arguments, not str"),
        ("logits_processors", [""], "a name must be a string, not ''"),
        ("logits_processors", [5], "a name must be a string, not 5"),
        ("logits_processors", ["a", "a"], "has a name twice"),
        ("logits_processors", [str(i) for i in range(17)], "has 17 entries; at most 16"),
        ("logits_processors", {"a": object()}, "JSON cannot express the argument"),
        ("logits_processors", {"a": math.nan}, "JSON cannot express the argument nan"),
        ("logits_processors", {"a": "x" * 70000}, "70002 characters as JSON; at most 65536"),
    ],
)
def test_L12_wrong_values_are_refused_by_field_value_and_range(field: str, value: object, message: str) -> None:
    error = refused(**{field: value})
    assert error.field == field
    assert message in str(error)


def test_every_parameter_is_checked() -> None:
    assert set(_CHECKS) == set(SamplingParams.__struct_fields__)


def test_stop_strings_need_the_text() -> None:
    error = refused(stop="x", detokenize=False)
    assert error.field == "stop"
    assert "detokenize=False does not go with it" in str(error)
    assert SamplingParams(stop=[], detokenize=False).detokenize is False


def test_L16_log_probabilities_of_a_prompt_need_all_of_it_computed() -> None:
    error = refused(prompt_logprobs=1, skip_reading_prefix_cache=False)
    assert error.field == "skip_reading_prefix_cache"
    assert SamplingParams(prompt_logprobs=1, skip_reading_prefix_cache=True).prompt_logprobs == 1


def test_arguments_of_logits_processors_as_json() -> None:
    assert SamplingParams().processor_arguments() == []
    assert SamplingParams(logits_processors=["b", "a"]).processor_arguments() == [("b", "null"), ("a", "null")]
    named = SamplingParams(logits_processors={"b": [1, 2.5], "a": {"text": "é"}})
    assert [(name, json.loads(text)) for name, text in named.processor_arguments()] == [
        ("b", [1, 2.5]),
        ("a", {"text": "é"}),
    ]


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1)  # type: ignore[call-arg]

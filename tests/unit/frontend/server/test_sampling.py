"""Fields of bodies → SamplingParams."""

from typing import Any

import msgspec
import pytest

from folovllm.common.errors import RequestError
from folovllm.common.sampling_params import SamplingParams
from folovllm.common.structured_outputs import StructuredOutputsParams
from folovllm.frontend.server.protocol.sampling import SamplingFields
from folovllm.frontend.server.sampling import to_sampling_params

# Fields of SamplingParams that bodies spell otherwise, or do not have.
_OTHERWISE = {"max_tokens", "logprobs", "structured_outputs", "logit_bias", "detokenize"}
_VALUES: dict[str, Any] = {
    "n": 2,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.5,
    "seed": 7,
    "stop": ["x"],
    "stop_token_ids": [3],
    "min_tokens": 2,
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.5,
    "allowed_token_ids": [5],
    "bad_words": ["x"],
    "prompt_logprobs": 1,
    "truncate_prompt_tokens": 4,
    "timeout_s": 3.0,
    "skip_reading_prefix_cache": True,
    "logits_processors": ["a"],
}


def params(**fields: Any) -> SamplingParams:
    return to_sampling_params(msgspec.convert(fields, SamplingFields), max_tokens=None)


def test_every_parameter_has_a_field() -> None:
    assert set(SamplingParams.__struct_fields__) == set(_VALUES) | _OTHERWISE


@pytest.mark.parametrize("name", _VALUES)
def test_a_field_is_passed_on_and_null_is_the_default(name: str) -> None:
    assert getattr(params(**{name: _VALUES[name]}), name) == _VALUES[name]
    assert getattr(params(**{name: None}), name) == getattr(SamplingParams(), name)


def test_what_the_endpoint_decides() -> None:
    made = to_sampling_params(SamplingFields(), max_tokens=7, logprobs=0, prompt_logprobs=None)
    assert (made.max_tokens, made.logprobs, made.prompt_logprobs) == (7, 0, None)
    assert to_sampling_params(SamplingFields(), max_tokens=None).max_tokens is None


def test_biases_have_ids_as_keys() -> None:
    assert params(logit_bias={"5": 1.0, "7": -2.0}).logit_bias == {5: 1.0, 7: -2.0}
    with pytest.raises(RequestError, match="'AI', which is no token id"):
        params(logit_bias={"5": 1.0, "AI": -2.0})


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutputsParams(json_object=True)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
            StructuredOutputsParams(json={"type": "object"}),
        ),
        ({"structured_outputs": {"json": {"type": "object"}}}, StructuredOutputsParams(json={"type": "object"})),
        ({"structured_outputs": {"json": True}}, StructuredOutputsParams(json="true")),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutputsParams(regex="a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutputsParams(choice=["a", "b"])),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, StructuredOutputsParams(grammar='start: "a"')),
    ],
)
def test_structured_outputs(fields: dict[str, Any], expected: StructuredOutputsParams | None) -> None:
    assert params(**fields).structured_outputs == expected


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"response_format": {"type": "text", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"store": True}, "store"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
def test_what_does_not_go_together(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(RequestError) as caught:
        params(**fields)
    assert caught.value.field == name


def test_a_tool_choice_and_a_schema_do_not_go_together() -> None:
    body = msgspec.convert({"response_format": {"type": "json_object"}}, SamplingFields)
    with pytest.raises(RequestError, match="tool_choice"):
        to_sampling_params(body, max_tokens=None, structured_outputs=StructuredOutputsParams(regex="a"))

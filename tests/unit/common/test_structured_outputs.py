"""One constraint and no other, in the form of the message."""

import json
import time
from typing import Any

import pytest

from folovllm.common.errors import RequestError
from folovllm.common.messages.frontend_core import Grammar
from folovllm.common.structured_outputs import StructuredOutputsParams


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"json": {"type": "object"}}, Grammar("json", '{"type": "object"}')),
        ({"json": '{"type":"string"}'}, Grammar("json", '{"type":"string"}')),
        ({"json": "true"}, Grammar("json", "true")),
        ({"json": {}}, Grammar("json", "{}")),
        ({"json_object": True}, Grammar("json_object", "")),
        ({"regex": r"\d{4}"}, Grammar("regex", r"\d{4}")),
        ({"choice": ["ja", "né\n"]}, Grammar("choice", '["ja", "né\\n"]')),
        ({"choice": ("a",)}, Grammar("choice", '["a"]')),
        ({"grammar": 'start: "x"'}, Grammar("lark", 'start: "x"')),
    ],
)
def test_each_kind_as_message(given: dict[str, Any], expected: Grammar) -> None:
    assert StructuredOutputsParams(**given).to_grammar() == expected


def test_the_order_of_properties_is_kept() -> None:
    schema: dict[str, Any] = {"properties": {"z": {}, "a": {}, "m": {}}}
    assert list(json.loads(StructuredOutputsParams(json=schema).to_grammar().text)["properties"]) == ["z", "a", "m"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs exactly one of json, json_object, regex, choice and grammar; it has none"),
        ({"regex": "a", "choice": ["b"]}, "it has regex and choice"),
        ({"json": "{"}, "structured_outputs.json is not valid JSON"),
        ({"json": "[1]"}, "must be a JSON schema, which is an object"),
        ({"json": ""}, "is not valid JSON"),
        ({"json": [1]}, "structured_outputs.json must be a string, not list"),
        ({"json": {"a": object()}}, "is not valid JSON"),
        ({"json": {"maximum": float("nan")}}, "is not valid JSON"),
        ({"json": nested(100_000)}, "is nested too deeply"),
        ({"json": "[" * 100_000}, "is nested too deeply"),
        ({"json_object": False}, "must be True"),
        ({"json_object": 1}, "must be True"),
        ({"regex": ""}, "structured_outputs.regex is empty"),
        ({"regex": 5}, "must be a string, not int"),
        ({"regex": "a" * (2**20 + 1)}, "has 1048577 characters; at most 1048576"),
        ({"choice": []}, "at least one text"),
        ({"choice": ["a", ""]}, "none that is empty"),
        ({"choice": "ab"}, "must be a list of strings"),
        ({"choice": ["a", 1]}, "must be a list of strings"),
        ({"choice": [str(i) for i in range(5000)]}, "has 5000 texts; at most 4096"),
        ({"grammar": "\ud800"}, "holds a lone surrogate"),
        ({"grammar": ""}, "structured_outputs.grammar is empty"),
    ],
)
def test_L28_what_cannot_be_a_constraint_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    begun = time.thread_time()
    with pytest.raises(RequestError) as caught:
        StructuredOutputsParams(**given)
    assert time.thread_time() - begun < 1
    assert caught.value.field == "structured_outputs"
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="xgrammar"):
        StructuredOutputsParams(xgrammar="x")  # type: ignore[call-arg]

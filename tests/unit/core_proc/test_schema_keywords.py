"""Keywords of JSON Schema pass wherever they stand; others are named with their place."""

from typing import Any

import pytest

from folovllm.core_proc.schema_keywords import unknown_keyword
from tests.fakes.schemas import ENFORCED


@pytest.mark.parametrize("name", ENFORCED)
def test_schemas_that_are_enforced_have_none(name: str) -> None:
    assert unknown_keyword(ENFORCED[name]) == ""


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        ({"typo": 1}, "'typo' in #"),
        ({"properties": {"a": {"typo": 1}}}, "'typo' in #/properties/a"),
        ({"items": {"typo": 1}}, "'typo' in #/items"),
        ({"items": [{}, {"typo": 1}]}, "'typo' in #/items/1"),
        ({"anyOf": [{"additionalProperties": {"typo": 1}}]}, "'typo' in #/anyOf/0/additionalProperties"),
        ({"$defs": {"d": {"not": {"typo": 1}}}}, "'typo' in #/$defs/d/not"),
        ({"t" * 1000: 1}, f"'{'t' * 80}' in #"),
    ],
)
def test_others_are_named_with_their_place(schema: dict[str, Any], found: str) -> None:
    assert unknown_keyword(schema) == found


@pytest.mark.parametrize(
    "schema",
    [
        {"x-order": 1, "properties": {"typo": {"x-guidance": {"typo": 1}}}},
        {"const": {"typo": 1}, "enum": [{"typo": 1}], "default": {"typo": 1}, "examples": [{"typo": 1}]},
        {"additionalProperties": False, "items": True, "properties": "no schema", "anyOf": {"typo": 1}},
    ],
)
def test_names_and_values_are_no_keywords(schema: dict[str, Any]) -> None:
    assert unknown_keyword(schema) == ""


def test_depth_costs_no_stack() -> None:
    schema: dict[str, Any] = {"typo": 1}
    for _ in range(20_000):
        schema = {"items": schema}
    assert unknown_keyword(schema).startswith("'typo' in #/items/items")

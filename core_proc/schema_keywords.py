"""Finds keywords in a JSON schema that are none: a misspelt `maxLenght` would otherwise leave a text unbounded.

Keywords of JSON Schema (drafts 4 to 2020-12) pass, those that only describe included, and any that begins with `x-`.
Whether a keyword can be enforced is llguidance's to say.
"""

from collections.abc import Iterator
from typing import Any, Final

_IN_ONE: Final = frozenset(
    {
        *("additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not"),
        *("propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"),
    }
)
_IN_LIST: Final = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})
_IN_MAP: Final = frozenset(
    {"$defs", "definitions", "dependentSchemas", "dependencies", "patternProperties", "properties"}
)
_ASSERTIONS: Final = frozenset(
    {
        *("$ref", "$dynamicRef", "$recursiveRef", "const", "dependentRequired", "enum", "exclusiveMaximum"),
        *("exclusiveMinimum", "format", "maxContains", "maxItems", "maxLength", "maxProperties", "maximum"),
        *("minContains", "minItems", "minLength", "minProperties", "minimum", "multipleOf", "pattern", "required"),
        *("type", "uniqueItems"),
    }
)
_ANNOTATIONS: Final = frozenset(
    {
        *("$anchor", "$comment", "$dynamicAnchor", "$id", "$recursiveAnchor", "$schema", "$vocabulary", "id"),
        *("contentEncoding", "contentMediaType", "default", "deprecated", "description", "examples", "readOnly"),
        *("title", "writeOnly"),
        *("discriminator", "example", "externalDocs", "xml"),  # OpenAPI's, which only describe
    }
)
_KEYWORDS: Final = _IN_ONE | _IN_LIST | _IN_MAP | _ASSERTIONS | _ANNOTATIONS
_MAX_SHOWN_CHARACTERS: Final = 80


def unknown_keyword(schema: dict[str, Any]) -> str:
    """The first one found with the place where it stands, "" if there is none."""
    for place, part in _schemas(schema):
        for key in part:
            if key not in _KEYWORDS and not key.startswith("x-"):
                return f"{key[:_MAX_SHOWN_CHARACTERS]!r} in {place[:_MAX_SHOWN_CHARACTERS]}"
    return ""


def _schemas(root: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All schemas inside a schema, itself first, with where they stand."""
    open_ones = [("#", root)]
    while open_ones:
        place, schema = open_ones.pop()
        yield place, schema
        for key, value in schema.items():
            inner = [(f"{place}/{key}{path}", part) for path, part in _inside(key, value)]
            open_ones += [(where, part) for where, part in inner if isinstance(part, dict)]


def _inside(key: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, list):
        return [(f"/{index}", part) for index, part in enumerate(value)] if key in _IN_LIST else []
    if key in _IN_MAP and isinstance(value, dict):
        return [(f"/{name}", part) for name, part in value.items()]
    return [("", value)] if key in _IN_ONE else []

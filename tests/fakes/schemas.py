"""JSON schemas as users write them: those that must be enforced, and those that must be refused with a cause."""

from typing import Any

_POINT = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x", "y"]}


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    """An object of exactly these properties."""
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


ENFORCED: dict[str, dict[str, Any]] = {
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "string": {"type": "string", "maxLength": 30},
    "types": {"type": ["integer", "null", "boolean"]},
    "integer range": {"type": "integer", "minimum": -5, "maximum": 17},
    "exclusive range": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 4},
    "large maximum": {"type": "integer", "minimum": 0, "maximum": 20000000000},
    "number range": {"type": "number", "minimum": 0.5, "maximum": 2.25},
    "multiple of": {"type": "integer", "multipleOf": 7, "minimum": 0},
    "length": {"type": "string", "minLength": 2, "maxLength": 4},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "pattern inside": {"type": "string", "pattern": "ab+c", "maxLength": 12},
    "date": {"type": "string", "format": "date"},
    "ipv6": {"type": "string", "format": "ipv6"},
    "a special token's text": closed(["<|im_end|>"], **{"<|im_end|>": {"const": "a<|im_end|>b"}}),
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "email": {"type": "string", "format": "email", "maxLength": 24},
    "const": {"const": {"a": [1, None, "ü"]}},
    "enum": {"enum": ["red", "green", 7, None, [1, 2]]},
    "array": {"type": "array", "items": {"type": "integer"}, "maxItems": 4},
    "array lengths": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "string", "maxLength": 5}],
        "items": False,
        "minItems": 2,
    },
    "array of arrays": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        "maxItems": 3,
    },
    "object": closed(["name", "age"], name={"type": "string", "maxLength": 10}, age={"type": "integer"}),
    "optional property": closed(["a"], a={"type": "integer"}, b={"type": "boolean"}, c={"type": "null"}),
    "no property required": closed([], a={"type": "integer"}, b={"type": "boolean"}),
    "open object": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "typed others": {"type": "object", "additionalProperties": {"type": "integer"}},
    "only others": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3},
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^n_[a-z]{1,3}$": {"type": "integer"}},
        "additionalProperties": False,
    },
    "nested": closed(["at"], at=closed(["p"], p=closed(["q"], q={"type": "integer"}))),
    "empty object": closed([]),
    "definitions": {
        "$defs": {"point": _POINT | {"additionalProperties": False}},
        **closed(["from", "to"], **{"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}}),
    },
    "old definitions": {
        "definitions": {"word": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 6}},
        **closed(["w"], w={"$ref": "#/definitions/word"}),
    },
    "recursive": {
        "$defs": {"node": closed(["value"], value={"type": "integer"}, next={"$ref": "#/$defs/node"})},
        "$ref": "#/$defs/node",
    },
    "tree": {
        "$defs": {
            "tree": closed(["kids"], kids={"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}),
        },
        "$ref": "#/$defs/tree",
    },
    "any of": {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 4}, {"type": "null"}]},
    "one of, apart": {"oneOf": [{"type": "string", "maxLength": 4}, {"type": "integer"}]},
    "one of, told apart by a constant": {
        "oneOf": [
            closed(["kind", "r"], kind={"const": "circle"}, r={"type": "integer"}),
            closed(["kind", "a"], kind={"const": "square"}, a={"type": "integer"}),
        ]
    },
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    "nullable": closed(["x"], x={"anyOf": [{"type": "integer"}, {"type": "null"}]}),
    "annotations": {
        "title": "T",
        "description": "d",
        "examples": [1],
        "default": 2,
        "$comment": "c",
        "type": "integer",
    },
    "strict tool": closed(
        ["city", "unit"], city={"type": "string", "maxLength": 12}, unit={"type": "string", "enum": ["C", "F"]}
    ),
    "names with quotes": closed(['a"b', "ü\\"], **{'a"b': {"type": "integer"}, "ü\\": {"type": "null"}}),
    "nothing said": {"maxLength": 5, "maxItems": 1, "maxProperties": 1},
    "no blanks": closed(["a"], a={"type": "integer"}) | {"x-guidance": {"whitespace_flexible": False}},
}

# name: schema and what the refusal names
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no type": ({"type": "not-a-type"}, "not-a-type"),
    "property that is no schema": ({"properties": {"foo": "bar"}}, "schema must be an object"),
    "reference to itself": ({"$ref": "#"}, "NoExtension"),
    "reference to nowhere": ({"$ref": "#/$defs/none"}, "does not exist"),
    "pattern": ({"type": "string", "pattern": "^(a"}, "unclosed group"),
    "without its wrapper": ({"json_schema": {"type": "integer"}}, "json_schema"),
    "misspelt": (closed(["a"], a={"type": "string", "maxLenght": 3}), "maxLenght"),
    "nullable of OpenAPI": ({"type": "integer", "nullable": True}, "nullable"),
    "unique items": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "not": ({"not": {"type": "string"}}, "not"),
    "if": ({"if": {"type": "string"}, "then": {"maxLength": 3}}, "if"),
    "options that are none": ({"type": "integer", "x-guidance": 1}, "x-guidance"),
    "lenient": ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
    "one of, not apart": ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
    "one of, approximated": (
        {"oneOf": [{"type": "number"}, {"type": "integer"}], "x-guidance": {"coerce_one_of": True}},
        "oneOf",
    ),
    "unknown format": ({"type": "string", "format": "shoe-size"}, "shoe-size"),
    "contradiction": ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater"),
    "property names": ({"type": "object", "propertyNames": {"maxLength": 2}}, "propertyNames"),
    "dependent": ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
}

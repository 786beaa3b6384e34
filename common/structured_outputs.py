"""What the text of an answer must look like, as the user asks for it."""

import json
from typing import Any

import msgspec

from folovllm.common.errors import RequestError
from folovllm.common.messages.frontend_core import Grammar

MAX_GRAMMAR_CHARACTERS = 2**20
MAX_CHOICES = 4096

_FIELD = "structured_outputs"


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A constraint on the text of an answer; exactly one of the fields is set. Names follow vLLM.

    Whether a schema, expression or grammar can be enforced is found out by the core, before the request is admitted.

    Attributes:
        json: a JSON schema, as a dict or as JSON text.
        json_object: True: any JSON object.
        regex: a regular expression that the whole text matches.
        choice: the text is one of these.
        grammar: a grammar in Lark's notation.

    Raises:
        RequestError: none or several are set, or one cannot be a constraint; the message names it.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs needs exactly one of json, json_object, regex, choice and grammar; "
                f"it has {' and '.join(given) or 'none'}",
                _FIELD,
            )
        self.to_grammar()

    def to_grammar(self) -> Grammar:
        """The message's form of it."""
        if self.json is not None:
            return Grammar("json", _checked_text("json", _as_text(self.json)))
        if self.json_object is not None:
            if self.json_object is not True:
                raise _refusal("json_object", "must be True, or None for no constraint")
            return Grammar("json_object", "")
        if self.regex is not None:
            return Grammar("regex", _checked_text("regex", self.regex))
        if self.choice is not None:
            return Grammar("choice", _checked_text("choice", _as_choices(self.choice)))
        return Grammar("lark", _checked_text("grammar", self.grammar))


def _as_text(schema: Any) -> Any:
    """A schema as JSON text; what is text already is only checked to be a JSON object, or true or false."""
    try:
        if isinstance(schema, dict):
            return json.dumps(schema, ensure_ascii=False, allow_nan=False)
        if isinstance(schema, str) and not isinstance(json.loads(schema), dict | bool):
            raise _refusal("json", "must be a JSON schema, which is an object")
    except RecursionError as error:
        raise _refusal("json", "is nested too deeply") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise _refusal("json", f"is not valid JSON: {error}") from error
    return schema


def _as_choices(choices: Any) -> str:
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise _refusal("choice", "must be a list of strings")
    if not choices or "" in choices:
        raise _refusal("choice", "needs at least one text, and none that is empty")
    if len(choices) > MAX_CHOICES:
        raise _refusal("choice", f"has {len(choices)} texts; at most {MAX_CHOICES} are allowed")
    return json.dumps(choices, ensure_ascii=False)


def _checked_text(name: str, text: Any) -> str:
    if not isinstance(text, str):
        raise _refusal(name, f"must be a string, not {type(text).__name__}")
    if not text:
        raise _refusal(name, "is empty")
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise _refusal(name, f"has {len(text)} characters; at most {MAX_GRAMMAR_CHARACTERS} are allowed")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _refusal(name, "holds a lone surrogate, which is not valid Unicode text") from error
    return text


def _refusal(name: str, what: str) -> RequestError:
    return RequestError(f"structured_outputs.{name} {what}", _FIELD)

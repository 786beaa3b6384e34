"""One call, a JSON object with a function's name and its arguments, taken in bit by bit.

The arguments come out as they stand in the text, piece by piece, once the name is known; where they come first in the
object they are kept until then. Brackets count outside of strings only. What the text says is checked where it ends: a
name must be a string, arguments an object.
"""

from collections.abc import Callable
from typing import Any

import msgspec

_ARGUMENTS = ("arguments", "parameters")  # the second one is Llama's word
_BLANKS = " \t\r\n"
_ENDS_OF_SCALAR = ",}" + _BLANKS


class CallScanner:
    """Reads one object. Whoever uses it takes the pieces with `take` after each `push`.

    Attributes:
        raw: what was consumed so far.
        is_whole: the object is closed, and is a call.
        is_faulty: it is no call; nothing more is consumed.
        is_announced: `take` has given the name.
    """

    def __init__(self) -> None:
        self.raw = ""
        self.is_whole = False
        self.is_faulty = False
        self.is_announced = False
        self._state: Callable[[str], bool] = self._before_object
        self._key = ""
        self._seen: set[str] = set()
        self._name = ""
        self._value: list[str] = []
        self._closers: list[str] = []
        self._in_string = False
        self._is_escaped = False
        self._pending: list[str] = []
        self._has_arguments = False

    def push(self, text: str) -> int:
        """Takes in characters until the object, or the reading, ends; returns how many."""
        for place, character in enumerate(text):
            if self.is_whole or self.is_faulty or not self._state(character):
                self.raw += text[:place]
                return place
        self.raw += text
        return len(text)

    def take(self) -> tuple[str, str]:
        """The name, the first time it can be told, and what is new of the arguments; nothing of an unnamed call."""
        if not self._name or not self._has_arguments:
            return "", ""
        arguments = "".join(self._pending)
        self._pending.clear()
        name = "" if self.is_announced else self._name
        self.is_announced = True
        return name, arguments

    # ---- states: whether the character was consumed ------------------------------------------------------------------

    def _before_object(self, character: str) -> bool:
        return self._expect(character, {"{": self._before_first_key})

    def _before_first_key(self, character: str) -> bool:
        if character == "}":
            return self._close()
        return self._before_key(character)

    def _before_key(self, character: str) -> bool:
        self._value = ['"']
        return self._expect(character, {'"': self._in_key})

    def _in_key(self, character: str) -> bool:
        self._value.append(character)
        if self._string_ends(character):
            key = _decoded("".join(self._value))
            if not isinstance(key, str) or key in self._seen:
                return self._fail()
            self._key = "arguments" if key in _ARGUMENTS else key
            self._seen |= {*_ARGUMENTS} if key in _ARGUMENTS else {key}
            self._state = self._before_colon
        return True

    def _before_colon(self, character: str) -> bool:
        return self._expect(character, {":": self._before_value})

    def _before_value(self, character: str) -> bool:
        if character in _BLANKS:
            return True
        if self._key == "arguments" and character != "{":
            return self._fail()
        self._value = []
        self._has_arguments |= self._key == "arguments"
        self._state = self._in_nested if character in '{["' else self._in_scalar
        return self._state(character)

    def _in_nested(self, character: str) -> bool:
        """A string, or an object or a list with all that is in it."""
        self._keep(character)
        if self._in_string:
            self._in_string = not self._string_ends(character)
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._closers.append("}" if character == "{" else "]")
        elif character in "}]" and character != self._closers.pop():
            return self._fail(consumed=True)
        if not self._in_string and not self._closers:
            return self._end_value()
        return True

    def _in_scalar(self, character: str) -> bool:
        if character not in _ENDS_OF_SCALAR:
            self._keep(character)
            return True
        self._end_value()
        return not self.is_faulty and self._state(character)

    def _after_value(self, character: str) -> bool:
        if character == "}":
            return self._close()
        return self._expect(character, {",": self._before_key})

    # ---- what the states share ---------------------------------------------------------------------------------------

    def _expect(self, character: str, ways: dict[str, Callable[[str], bool]]) -> bool:
        """Goes on by one of `ways`, or waits where there is a blank."""
        if character in _BLANKS:
            return True
        if character not in ways:
            return self._fail()
        self._state = ways[character]
        return True

    def _keep(self, character: str) -> None:
        self._value.append(character)
        if self._key == "arguments":
            self._pending.append(character)

    def _string_ends(self, character: str) -> bool:
        """Whether the quote closes the string that is being read."""
        ends = character == '"' and not self._is_escaped
        self._is_escaped = character == "\\" and not self._is_escaped
        return ends

    def _end_value(self) -> bool:
        value = _decoded("".join(self._value))
        if self._key == "name" and isinstance(value, str):
            self._name = value
        is_right = bool(self._name) if self._key == "name" else value is not _INVALID
        self._state = self._after_value
        return is_right or self._fail(consumed=True)

    def _close(self) -> bool:
        """The object's end; a call without arguments has none."""
        if not self._name:
            return self._fail(consumed=True)
        if not self._has_arguments:
            self._has_arguments = True
            self._pending.append("{}")
        self.is_whole = True
        return True

    def _fail(self, *, consumed: bool = False) -> bool:
        self.is_faulty = True
        return consumed


_INVALID = object()


def _decoded(text: str) -> Any:
    """The value of a JSON text, `_INVALID` for one that is none."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return _INVALID

"""Calls as Llama 3 writes them: the whole answer is `{"name": …, "parameters": {…}}`, or several with `;` between.

An answer that does not begin with an object is content; so is an object that is no call, and all that follows it.
"""

from collections.abc import Sequence
from typing import Any

from folovllm.frontend.server.parsers.base import AnswerContext, CallDelta, ToolDelta, ToolFormat
from folovllm.frontend.server.parsers.call_scanner import CallScanner
from folovllm.frontend.server.parsers.grammar import call_grammar
from folovllm.frontend.server.parsers.pieces import joined
from folovllm.frontend.server.protocol.tools import Tool, ToolChoice

_TAG = "<|python_tag|>"  # a special token, so it is mostly not in the text
_BETWEEN = "; \t\r\n"


class Llama3JsonParser:
    """Finds the calls of one answer."""

    def __init__(self, _context: AnswerContext) -> None:
        self._rest = ""
        self._index = 0
        self._scanner: CallScanner | None = None
        self._is_text = False

    def push(self, text: str) -> ToolDelta:
        delta = ToolDelta()
        self._rest += text
        while self._is_next_object() if self._scanner is None else self._read_call(delta, self._scanner):
            pass
        if self._is_text:
            delta.content += self._rest
            self._rest = ""
        return delta

    def finish(self) -> ToolDelta:
        delta = ToolDelta()
        if self._scanner is not None and not self._scanner.is_announced:
            delta.content = self._scanner.raw
        elif self._scanner is None and not (self._index and not self._rest.strip(_BETWEEN)):
            delta.content = self._rest
        self._rest, self._scanner = "", None
        return delta

    def parse(self, text: str) -> ToolDelta:
        return joined([self.push(text), self.finish()])

    def _is_next_object(self) -> bool:
        """Whether a call may begin; if what comes is none, it is text for good."""
        if self._is_text:
            return False
        ahead = self._rest.lstrip(_BETWEEN if self._index else None)
        if ahead.startswith(_TAG) and not self._index:
            ahead = ahead.removeprefix(_TAG).lstrip()
        if ahead.startswith("{"):
            self._scanner = CallScanner()
            return True
        self._is_text = bool(ahead) and not (_TAG.startswith(ahead) and not self._index)
        return False

    def _read_call(self, delta: ToolDelta, scanner: CallScanner) -> bool:
        if not scanner.raw:
            self._rest = self._rest[self._rest.index("{") :]
        self._rest = self._rest[scanner.push(self._rest) :]
        name, arguments = scanner.take()
        if name or arguments or scanner.is_whole:
            delta.calls.append(CallDelta(self._index, name, arguments, done=scanner.is_whole))
        if scanner.is_faulty:
            delta.content += scanner.raw
            self._is_text = True
        if scanner.is_whole:
            self._index += 1
        if scanner.is_whole or scanner.is_faulty:
            self._scanner = None
        return self._scanner is None


def _constraint(tools: Sequence[Tool], choice: ToolChoice, parallel: bool) -> dict[str, Any]:
    between = "; " if parallel else None
    return {"grammar": call_grammar(tools, choice, around=("", ""), arguments="parameters", between=between)}


LLAMA3_JSON = ToolFormat(Llama3JsonParser, constraint=_constraint)

"""Calls as Hermes, Qwen2.5 and Qwen3 write them: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

What is between the tags and no call, by its JSON or because the text ends too early to tell, is content as it stands,
tags included. Blanks around calls belong to the markup.
"""

from collections.abc import Sequence
from typing import Any

from folovllm.frontend.server.parsers.base import AnswerContext, CallDelta, ToolDelta, ToolFormat
from folovllm.frontend.server.parsers.call_scanner import CallScanner
from folovllm.frontend.server.parsers.grammar import call_grammar
from folovllm.frontend.server.parsers.pieces import joined, length_of_tag_begun
from folovllm.frontend.server.protocol.tools import Tool, ToolChoice

_OPEN = "<tool_call>"
_CLOSE = "</tool_call>"


class HermesParser:
    """Finds the calls of one answer."""

    def __init__(self, _context: AnswerContext) -> None:
        self._rest = ""  # not looked at yet, or held back
        self._index = 0
        self._scanner: CallScanner | None = None  # of the call that is open
        self._markup = ""  # the open call as it stands, but for what the scanner has

    def push(self, text: str) -> ToolDelta:
        delta = ToolDelta()
        self._rest += text
        while self._find_call(delta) if self._scanner is None else self._read_call(delta, self._scanner):
            pass
        return delta

    def finish(self) -> ToolDelta:
        delta = ToolDelta()
        scanner = self._scanner
        if scanner is None:
            has_only_blanks = self._index > 0 and self._rest.isspace()
            delta.content = "" if has_only_blanks else self._rest
        elif scanner.is_whole:
            delta.calls.append(CallDelta(self._index, done=True))
        elif not scanner.is_announced:
            delta.content = self._markup + scanner.raw
        self._rest, self._scanner = "", None
        return delta

    def parse(self, text: str) -> ToolDelta:
        return joined([self.push(text), self.finish()])

    def _find_call(self, delta: ToolDelta) -> bool:
        """Gives out content; whether a call begins. Blanks wait for what comes behind them."""
        content, tag, behind = self._rest.partition(_OPEN)
        end = len(content) if tag else len(content) - length_of_tag_begun(content, _OPEN)
        end = len(content[:end].rstrip())
        delta.content += content[:end]
        if not tag:
            self._rest = content[end:]
            return False
        self._markup = content[end:] + tag
        self._rest = behind
        self._scanner = CallScanner()
        return True

    def _read_call(self, delta: ToolDelta, scanner: CallScanner) -> bool:
        """Gives out what is new of the open call; whether it is over, one way or the other."""
        self._rest = self._rest[scanner.push(self._rest) :]
        name, arguments = scanner.take()
        if name or arguments:
            delta.calls.append(CallDelta(self._index, name, arguments))
        if scanner.is_whole:
            rest = self._rest.lstrip()
            if rest.startswith(_CLOSE):
                delta.calls.append(CallDelta(self._index, done=True))
                self._leave_call(rest.removeprefix(_CLOSE), was_told=True)
                return True
            if _CLOSE.startswith(rest):
                return False
        elif not scanner.is_faulty:
            return False
        delta.content += self._markup + scanner.raw
        self._leave_call(self._rest, was_told=scanner.is_announced)
        return True

    def _leave_call(self, rest: str, *, was_told: bool) -> None:
        self._rest = rest
        self._index += was_told
        self._scanner = None


def _constraint(tools: Sequence[Tool], choice: ToolChoice, parallel: bool) -> dict[str, Any]:
    around, between = (f"{_OPEN}\n", f"\n{_CLOSE}"), "\n" if parallel else None
    return {"grammar": call_grammar(tools, choice, around=around, arguments="arguments", between=between)}


HERMES = ToolFormat(HermesParser, constraint=_constraint)

"""Parsers of made-up markup, small enough to be seen through: `(thoughts)` first, then `[name:arguments]` calls."""

from folovllm.frontend.server.parsers.base import (
    AnswerContext,
    CallDelta,
    ReasoningDelta,
    ReasoningFormat,
    ToolDelta,
    ToolFormat,
)


class Thoughts:
    """What stands in parentheses at the very beginning."""

    close_text = ")"

    def __init__(self, context: AnswerContext) -> None:
        self.in_reasoning = context.prompt.endswith("(")
        self._began = self.in_reasoning

    def push(self, text: str) -> ReasoningDelta:
        delta = ReasoningDelta()
        for character in text:
            if not self._began and character == "(":
                self.in_reasoning = True
            elif self.in_reasoning and character == ")":
                self.in_reasoning = False
            elif self.in_reasoning:
                delta.reasoning += character
            else:
                delta.content += character
            self._began = True
        return delta

    def finish(self) -> ReasoningDelta:
        return ReasoningDelta()

    def parse(self, text: str) -> ReasoningDelta:
        return self.push(text)


class Calls:
    """Calls in brackets; what is outside is content."""

    def __init__(self, context: AnswerContext) -> None:
        self._names = {tool.function.name for tool in context.tools}
        self._open: str | None = None
        self._index = -1

    def push(self, text: str) -> ToolDelta:
        delta = ToolDelta()
        for character in text:
            if self._open is None and character == "[":
                self._open = ""
            elif self._open is None:
                delta.content += character
            elif character == "]":
                self._open = None
                delta.calls.append(CallDelta(self._index, done=True))
            elif ":" in self._open:
                delta.calls.append(CallDelta(self._index, arguments=character))
            elif character == ":":
                self._index += 1
                delta.calls.append(CallDelta(self._index, name=self._open))
                self._open += character
            else:
                self._open += character
        return delta

    def finish(self) -> ToolDelta:
        return ToolDelta()

    def parse(self, text: str) -> ToolDelta:
        streamed = self.push(text)
        calls: dict[int, CallDelta] = {}
        for piece in streamed.calls:
            call = calls.setdefault(piece.index, CallDelta(piece.index))
            call.name += piece.name
            call.arguments += piece.arguments
            call.done |= piece.done
        return ToolDelta(streamed.content, list(calls.values()))


THOUGHTS = ReasoningFormat(Thoughts)
CALLS = ToolFormat(Calls, constraint=lambda tools, choice, parallel: {"regex": f"{len(tools)}{parallel}"})

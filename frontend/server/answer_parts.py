"""An answer's text → reasoning, content and tool calls, whole or as it comes.

The reasoning parser sees the text first, the tool parser what that calls content. A splitter belongs to one answer.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from folovllm.frontend.server.parsers.base import CallDelta, ReasoningParser, ToolParser


@dataclass(slots=True)
class Parts:
    """What a piece of text added; each may be empty."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is anything to write; that a call is done is nothing."""
        return bool(self.reasoning or self.content) or any(call.name or call.arguments for call in self.calls)


@dataclass(slots=True)
class WholeCall:
    """A call that is whole. `id` is made here; models write none."""

    id: str
    name: str
    arguments: str


class AnswerSplitter:
    """Parsers of one answer, one behind the other; without any, all is content.

    Attributes:
        num_done: calls that are whole so far.
        reasoning: all thoughts so far.
    """

    def __init__(
        self, reasoning: ReasoningParser | None = None, tools: ToolParser | None = None, *, max_calls: int | None = None
    ) -> None:
        """Args:
        reasoning, tools: None: there is nothing of the kind to be found.
        max_calls: further calls are left out.
        """
        self.num_done = 0
        self.reasoning = ""
        self._thoughts = reasoning
        self._tools = tools
        self._max_calls = max_calls
        self._ids: dict[int, str] = {}

    @property
    def is_plain(self) -> bool:
        """Whether all text is content."""
        return self._thoughts is None and self._tools is None

    def push(self, text: str, *, last: bool) -> Parts:
        """Takes the next piece of the text; behind the last one, what the parsers held back comes too."""
        if self.is_plain:
            return Parts(content=text)
        parts = self._push_thoughts(text)
        if last and self._thoughts is not None:
            held = self._thoughts.finish()
            self._add(parts, held.reasoning, held.content)
        if last and self._tools is not None:
            rest = self._tools.finish()
            parts.content += rest.content
            parts.calls += rest.calls
        return self._counted(parts)

    def _push_thoughts(self, text: str) -> Parts:
        parts = Parts()
        if self._thoughts is None:
            self._add(parts, "", text)
        else:
            split = self._thoughts.push(text)
            self._add(parts, split.reasoning, split.content)
        return parts

    def _add(self, parts: Parts, reasoning: str, content: str) -> None:
        parts.reasoning += reasoning
        if self._tools is None or not content:
            parts.content += content
            return
        found = self._tools.push(content)
        parts.content += found.content
        parts.calls += found.calls

    def whole(self, text: str) -> Parts:
        """A whole text at once, on a splitter that was pushed nothing; each call has one delta."""
        parts = Parts(content=text)
        if self._thoughts is not None:
            split = self._thoughts.parse(text)
            parts = Parts(split.reasoning, split.content)
        if self._tools is not None:
            found = self._tools.parse(parts.content)
            parts = Parts(parts.reasoning, found.content, found.calls)
        return self._counted(parts)

    def _counted(self, parts: Parts) -> Parts:
        if self._max_calls is not None:
            parts.calls = [call for call in parts.calls if call.index < self._max_calls]
        self.num_done += sum(call.done for call in parts.calls)
        self.reasoning += parts.reasoning
        return parts

    def call_id(self, index: int) -> str:
        """The id of a call; the same whenever it is asked."""
        return self._ids.setdefault(index, f"call_{uuid.uuid4().hex[:24]}")

    def whole_calls(self, calls: Sequence[CallDelta]) -> list[WholeCall]:
        """Those that `whole` found and that are whole."""
        return [WholeCall(self.call_id(call.index), call.name, call.arguments) for call in calls if call.done]

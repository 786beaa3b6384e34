"""Thoughts in `<think>…</think>` at the beginning of an answer: Qwen3, DeepSeek-R1 and their kin.

The template may have opened the tag in the prompt already. Blanks at the tags belong to them. Tags further on are
content: a model that writes about them has thought before.
"""

from folovllm.frontend.server.parsers.base import AnswerContext, ReasoningDelta, ReasoningFormat
from folovllm.frontend.server.parsers.pieces import length_of_tag_begun

_OPEN = "<think>"
_CLOSE = "</think>"


class ThinkParser:
    """Splits one answer. See `ReasoningParser` for its attributes."""

    close_text = f"\n{_CLOSE}\n\n"

    def __init__(self, context: AnswerContext) -> None:
        self.in_reasoning = context.prompt.rstrip().endswith(_OPEN)
        self._may_begin = not self.in_reasoning
        self._skips_blanks = self.in_reasoning
        self._rest = ""  # held back

    def push(self, text: str) -> ReasoningDelta:
        self._rest += text
        delta = ReasoningDelta()
        if self._may_begin:
            self._look_for_beginning()
        if self._may_begin:
            return delta
        if self.in_reasoning:
            self._take_reasoning(delta)
        if not self.in_reasoning:
            delta.content, self._rest = self._without_first_blanks(self._rest), ""
        return delta

    def finish(self) -> ReasoningDelta:
        rest, self._rest = self._rest, ""
        if not self.in_reasoning:
            return ReasoningDelta(content=rest)
        return ReasoningDelta(reasoning=rest.rstrip())

    def parse(self, text: str) -> ReasoningDelta:
        first, last = self.push(text), self.finish()
        return ReasoningDelta(first.reasoning + last.reasoning, first.content + last.content)

    def _look_for_beginning(self) -> None:
        ahead = self._rest.lstrip()
        if ahead.startswith(_OPEN):
            self.in_reasoning = self._skips_blanks = True
            self._may_begin, self._rest = False, ahead.removeprefix(_OPEN)
        elif not _OPEN.startswith(ahead):
            self._may_begin = False

    def _take_reasoning(self, delta: ReasoningDelta) -> None:
        """Blanks wait for what comes behind them, and so does what may become the tag."""
        thoughts, tag, behind = self._without_first_blanks(self._rest).partition(_CLOSE)
        end = len(thoughts) if tag else len(thoughts) - length_of_tag_begun(thoughts, _CLOSE)
        end = len(thoughts[:end].rstrip())
        delta.reasoning += thoughts[:end]
        self._rest = behind if tag else thoughts[end:]
        if tag:
            self.in_reasoning, self._skips_blanks = False, True

    def _without_first_blanks(self, text: str) -> str:
        if self._skips_blanks:
            text = text.lstrip()
            self._skips_blanks = not text
        return text


THINK = ReasoningFormat(ThinkParser)

"""The interfaces of parsers: text of an answer in, its parts out.

An answer's text goes through the reasoning parser first; what that calls content goes through the tool parser. A parser
belongs to one answer (index) of one request and is made by its factory when the request begins. It sees text, whole
characters, cut anywhere; it holds back what may yet become markup, never more than one tag's length, and gives it out
with `finish`.

Whole and streamed must be equal: for every way to cut a text, the joined results of `push`, then `finish`, equal
`parse(text)`. Parsers never raise on what a model wrote: what is no call is content.

    parser = factory(AnswerContext(tools=..., ...))
    parts = [parser.push(piece) for piece in pieces] + [parser.finish()]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from folovllm.frontend.server.protocol.tools import Tool, ToolChoice
from folovllm.frontend.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class AnswerContext:
    """What a parser may know about its request.

    Attributes:
        tokenizer: of the model.
        prompt: the rendered conversation; a reasoning parser looks whether it ends within an open tag.
        tools: those offered.
        tool_choice: which of them may, or must, be called.
        template_kwargs: what the request gave to the chat template, such as `enable_thinking`.
    """

    tokenizer: Tokenizer
    prompt: str
    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice = "auto"
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class ReasoningDelta:
    """What a piece of text added to the thoughts and to the rest; either may be empty."""

    reasoning: str = ""
    content: str = ""


class ReasoningParser(Protocol):
    """Splits an answer in thoughts and content; the tags belong to neither.

    Attributes:
        in_reasoning: whether the text so far ends within the thoughts; counts tokens of reasoning, bounds them.
        close_text: what ends the thoughts, such as "</think>\\n\\n"; written into an answer that used up its
            `thinking_budget`.
    """

    in_reasoning: bool
    close_text: str

    def push(self, text: str) -> ReasoningDelta:
        """Takes the next piece."""

    def finish(self) -> ReasoningDelta:
        """The answer has ended: what was held back."""

    def parse(self, text: str) -> ReasoningDelta:
        """A whole answer at once, on a parser that was pushed nothing."""


@dataclass(slots=True)
class CallDelta:
    """What a piece of text added to one call.

    Attributes:
        index: of the call in its answer, from 0.
        name: of the function, in the call's first delta, else "".
        arguments: a piece of the JSON text of its arguments.
        done: the call is whole now: its markup is closed and its arguments are one JSON object.
    """

    index: int
    name: str = ""
    arguments: str = ""
    done: bool = False


@dataclass(slots=True)
class ToolDelta:
    """What a piece of text added to the content and to the calls."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class ToolParser(Protocol):
    """Finds tool calls.

    A streamed call that is cut off (the answer ends within it) has given out part of its arguments and is never `done`;
    `parse` gives it out in the same way. Whoever writes the answer leaves such calls out where it is not streamed, says
    finish_reason "tool_calls" only where a call is done, and gives each call its id.
    """

    def push(self, text: str) -> ToolDelta:
        """Takes the next piece."""

    def finish(self) -> ToolDelta:
        """The answer has ended: what was held back."""

    def parse(self, text: str) -> ToolDelta:
        """A whole answer at once, on a parser that was pushed nothing; each call has one delta."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes tool calls.

    Attributes:
        make: makes the parser of one answer.
        keep_special_tokens: the markup is made of special tokens, so that the text must keep them.
        constraint: (tools, tool_choice, parallel_tool_calls) → keyword arguments of StructuredOutputsParams that hold
            an answer to calls of these tools, for tool_choice "required" or one function; None: the format has no
            grammar, and such a tool_choice is refused.
    """

    make: Callable[[AnswerContext], ToolParser]
    keep_special_tokens: bool = False
    constraint: Callable[[Sequence[Tool], ToolChoice, bool], dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model writes its thoughts.

    Attributes:
        make: makes the parser of one answer.
        keep_special_tokens: the tags are special tokens, so that the text must keep them.
    """

    make: Callable[[AnswerContext], ReasoningParser]
    keep_special_tokens: bool = False

"""Texts in pieces, and what the parsers make of them."""

from collections.abc import Iterable
from itertools import pairwise

from folovllm.frontend.server.parsers.base import AnswerContext, ReasoningDelta, ReasoningFormat, ToolDelta, ToolFormat
from folovllm.frontend.server.parsers.pieces import joined
from tests.fakes.tokenizers_ import case_tokenizer

CONTEXT = AnswerContext(case_tokenizer(), "<|im_start|>assistant\n")


def cut(text: str, places: Iterable[int]) -> list[str]:
    """The text in pieces that begin at these places, wherever they are in it."""
    edges = sorted({0, len(text), *(place for place in places if place < len(text))})
    return [text[start:end] for start, end in pairwise(edges)]


def streamed_calls(format_: ToolFormat, pieces: Iterable[str]) -> ToolDelta:
    """All that a parser gives out for a text in pieces."""
    parser = format_.make(CONTEXT)
    return joined([*map(parser.push, pieces), parser.finish()])


def streamed_thoughts(format_: ReasoningFormat, pieces: Iterable[str], context: AnswerContext) -> ReasoningDelta:
    """All that a parser gives out for a text in pieces."""
    parser = format_.make(context)
    deltas = [*map(parser.push, pieces), parser.finish()]
    return ReasoningDelta("".join(delta.reasoning for delta in deltas), "".join(delta.content for delta in deltas))

"""Thoughts between `<think>` tags."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm.frontend.server.parsers.base import AnswerContext, ReasoningDelta
from folovllm.frontend.server.parsers.think import THINK, ThinkParser
from tests.unit.frontend.server.parsers.cutting import CONTEXT, cut, streamed_thoughts

OPENED = replace(CONTEXT, prompt="<|im_start|>assistant\n<think>\n")
CLOSED = replace(CONTEXT, prompt="<|im_start|>assistant\n<think>\n\n</think>\n\n")
PIECES = st.sampled_from(["<think>", "</think>", "<thi", "</", "\n", " ", "a plan", "世", "<", "ink>"])


@pytest.mark.parametrize(
    "context, text, reasoning, content",
    [
        (CONTEXT, "<think>\na plan\n</think>\n\nHello\n", "a plan", "Hello\n"),
        (CONTEXT, "\n<think></think>Hello", "", "Hello"),
        (CONTEXT, " Hello <think>x</think>", "", " Hello <think>x</think>"),
        (CONTEXT, "<think>a < b</think>c</think>", "a < b", "c</think>"),
        (CONTEXT, "<think>\na pl", "a pl", ""),
        (CONTEXT, "<think>a </thi", "a </thi", ""),
        (CONTEXT, "<thi", "", "<thi"),
        (OPENED, "a plan\n</think>\n\nHello", "a plan", "Hello"),
        (OPENED, "a plan", "a plan", ""),
        (CLOSED, "Hello", "", "Hello"),
        (replace(OPENED, prompt=OPENED.prompt + ThinkParser.close_text), '{"a": 1}', "", '{"a": 1}'),
    ],
)
def test_thoughts_and_content(context: AnswerContext, text: str, reasoning: str, content: str) -> None:
    assert ThinkParser(context).parse(text) == ReasoningDelta(reasoning, content)


def test_in_reasoning_follows_the_text() -> None:
    parser = ThinkParser(CONTEXT)
    states = [parser.in_reasoning]
    for piece in ("<thi", "nk>", "a", "</think", ">", "b"):
        parser.push(piece)
        states.append(parser.in_reasoning)
    assert states == [False, False, True, True, True, False, False]
    assert ThinkParser(OPENED).in_reasoning
    assert not ThinkParser(CLOSED).in_reasoning


def test_the_closing_text_closes() -> None:
    parser = ThinkParser(OPENED)
    parser.push("so far" + ThinkParser.close_text)
    assert not parser.in_reasoning
    assert parser.push("42") == ReasoningDelta("", "42")


def test_thoughts_go_out_as_they_come() -> None:
    parser = ThinkParser(CONTEXT)
    pushed = [parser.push(piece) for piece in ("<think>\n", "one ", "two</", "b></think", ">\n", "\nthree ")]
    assert [delta.reasoning for delta in pushed] == ["", "one", " two", "</b>", "", ""]
    assert [delta.content for delta in pushed] == ["", "", "", "", "", "three "]


@given(
    st.lists(PIECES, max_size=10).map("".join), st.sets(st.integers(0, 60)), st.sampled_from([CONTEXT, OPENED, CLOSED])
)
def test_streamed_equals_whole_wherever_it_is_cut(text: str, cuts: set[int], context: AnswerContext) -> None:
    assert streamed_thoughts(THINK, cut(text, cuts), context) == ThinkParser(context).parse(text)

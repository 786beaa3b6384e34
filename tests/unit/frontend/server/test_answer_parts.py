"""Text of an answer → reasoning, content, calls: whole, and cut anywhere."""

import itertools
import pathlib

import pytest

from folovllm.frontend.server.answer_parts import AnswerSplitter, Parts
from folovllm.frontend.server.parsers.base import AnswerContext, CallDelta
from folovllm.frontend.tokenizer import Tokenizer
from tests.fakes.parsers import Calls, Thoughts

TEXT = "(a plan)Let me[f:{1}] see[g:{}]."


@pytest.fixture(scope="module")
def context(model_folder: pathlib.Path) -> AnswerContext:
    return AnswerContext(Tokenizer.from_folder(model_folder), "prompt")


def splitter(context: AnswerContext, *, max_calls: int | None = None) -> AnswerSplitter:
    return AnswerSplitter(Thoughts(context), Calls(context), max_calls=max_calls)


def test_whole(context: AnswerContext) -> None:
    split = splitter(context)
    parts = split.whole(TEXT)
    assert (parts.reasoning, parts.content) == ("a plan", "Let me see.")
    calls = split.whole_calls(parts.calls)
    assert [(call.name, call.arguments) for call in calls] == [("f", "{1}"), ("g", "{}")]
    assert calls[0].id != calls[1].id
    assert all(call.id.startswith("call_") for call in calls)
    assert split.num_done == 2


@pytest.mark.parametrize("cuts", [*itertools.combinations(range(1, len(TEXT), 3), 2), ()])
def test_streamed_equals_whole_wherever_it_is_cut(context: AnswerContext, cuts: tuple[int, ...]) -> None:
    split = splitter(context)
    edges = [0, *cuts, len(TEXT)]
    pieces = [TEXT[start:end] for start, end in itertools.pairwise(edges)]
    parts = [split.push(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    assert "".join(part.reasoning for part in parts) == split.reasoning == "a plan"
    assert "".join(part.content for part in parts) == "Let me see."
    calls = [call for part in parts for call in part.calls]
    assert "".join(call.arguments for call in calls if call.index == 0) == "{1}"
    assert [call.name for call in calls if call.name] == ["f", "g"]
    assert split.num_done == 2


def test_a_call_that_is_cut_off_is_none(context: AnswerContext) -> None:
    split = splitter(context)
    parts = split.whole("ok[f:{1")
    assert parts.content == "ok"
    assert split.whole_calls(parts.calls) == []
    assert split.num_done == 0


def test_at_most_so_many_calls(context: AnswerContext) -> None:
    split = splitter(context, max_calls=1)
    assert [call.index for call in split.whole(TEXT).calls] == [0]
    assert split.num_done == 1


def test_without_parsers_all_is_content() -> None:
    split = AnswerSplitter()
    assert split.is_plain
    assert split.push("(x)[y:z]", last=False) == Parts(content="(x)[y:z]")
    assert split.whole("(x)") == Parts(content="(x)")


def test_reasoning_alone_and_calls_alone(context: AnswerContext) -> None:
    assert AnswerSplitter(Thoughts(context)).whole("(a)[f:]") == Parts("a", "[f:]")
    assert AnswerSplitter(None, Calls(context)).push("(a)[f:]", last=True).content == "(a)"


def test_parts_are_something_unless_only_an_end_is_told() -> None:
    assert not Parts()
    assert not Parts(calls=[CallDelta(0, done=True)])
    assert Parts(reasoning="x")
    assert Parts(calls=[CallDelta(0, name="f")])

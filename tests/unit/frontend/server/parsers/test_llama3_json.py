"""Calls as bare objects."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm.frontend.server.parsers.base import CallDelta, ToolDelta
from folovllm.frontend.server.parsers.llama3_json import LLAMA3_JSON
from tests.unit.frontend.server.parsers.cutting import CONTEXT, cut, streamed_calls

F = '{"name": "f", "parameters": {"a": "}"}}'
FOUND = ("f", '{"a": "}"}')
PIECES = st.sampled_from(
    [F, "<|python_tag|>", "<|py", ";", " ", "\n", "{", "}", '"name"', ": ", "hello", '{"name": "g"}']
)


def parse(text: str) -> ToolDelta:
    return LLAMA3_JSON.make(CONTEXT).parse(text)


@pytest.mark.parametrize(
    "text, content, calls",
    [
        (F, "", [FOUND]),
        (f"\n<|python_tag|> {F}\n", "", [FOUND]),
        (f"{F}; {F}", "", [FOUND, FOUND]),
        (f"{F}\n{F};", "", [FOUND, FOUND]),
        (f"{F} and then", " and then", [FOUND]),
        ('{"name": "f", "arguments": {}}', "", [("f", "{}")]),
        ("hello " + F, "hello " + F, []),
        ('{"city": "Berlin"}', '{"city": "Berlin"}', []),
        (f'{{"a": 1}} {F}', f'{{"a": 1}} {F}', []),
        ('{"nam', '{"nam', []),
        ("<|python", "<|python", []),
        ("", "", []),
    ],
)
def test_content_and_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    found = parse(text)
    assert found.content == content
    assert [(call.name, call.arguments) for call in found.calls if call.done] == calls


def test_a_call_that_is_cut_off_is_not_done() -> None:
    assert parse('{"name": "f", "parameters": {"a"') == ToolDelta("", [CallDelta(0, "f", '{"a"')])


@given(st.lists(PIECES, max_size=10).map("".join), st.sets(st.integers(0, 150)))
def test_streamed_equals_whole_wherever_it_is_cut(text: str, cuts: set[int]) -> None:
    assert streamed_calls(LLAMA3_JSON, cut(text, cuts)) == parse(text)

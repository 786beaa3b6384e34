"""Calls between `<tool_call>` tags."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from folovllm.frontend.server.parsers.base import CallDelta, ToolDelta
from folovllm.frontend.server.parsers.hermes import HERMES
from tests.fakes.tokenizers_ import case_tokenizer
from tests.unit.frontend.server.parsers.cutting import CONTEXT, cut, streamed_calls

F = '{"name": "f", "arguments": {"cmd": "a{b"}}'
PIECES = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<tool_", "</tool_call", "<", "\n", " ", "hello", "世", F, '{"name": "g"}'),
        *('{"name":', '"f"', '"arguments": ', "{", "}", "x", '"', "\\"),
    ]
)


def parse(text: str) -> ToolDelta:
    return HERMES.make(CONTEXT).parse(text)


def calls_of(text: str) -> list[tuple[str, str]]:
    """Whole calls alone."""
    return [(call.name, call.arguments) for call in parse(text).calls if call.done]


@pytest.mark.parametrize(
    "text, content, calls",
    [
        ("hello", "hello", []),
        (f"<tool_call>\n{F}\n</tool_call>", "", [("f", '{"cmd": "a{b"}')]),
        (f"Look:\n<tool_call>{F}</tool_call>", "Look:", [("f", '{"cmd": "a{b"}')]),
        (
            f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{{'name'}}",
            "\n<tool_call>\n{'name'}",
            [("f", '{"cmd": "a{b"}')],
        ),
        (f"<tool_call>{F}</tool_call>\n<tool_call>{F}</tool_call>\n", "", [("f", '{"cmd": "a{b"}')] * 2),
        (f"<tool_call>{F}</tool_call> Done", " Done", [("f", '{"cmd": "a{b"}')]),
        (f"<tool_call>{F}", "", [("f", '{"cmd": "a{b"}')]),  # nothing is missing but the tag
        (f"<tool_call>{F}}}</tool_call>", f"<tool_call>{F}}}</tool_call>", []),
        ("<tool_call>f(1)</tool_call>", "<tool_call>f(1)</tool_call>", []),
        ("a <tool", "a <tool", []),
        (" \n", " \n", []),
    ],
)
def test_content_and_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parse(text).content == content
    assert calls_of(text) == calls


@pytest.mark.parametrize("arguments", ['{"a": "\\""}', '{"a": "<tool_call>"}', '{"a": "</tool_call>"}', '{"a": "世}"}'])
def test_L30_marks_within_strings(arguments: str) -> None:
    call = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    assert calls_of(call) == [("f", arguments)]
    assert parse(call).content == ""
    assert streamed_calls(HERMES, cut(call * 2, range(len(call) * 2))) == parse(call * 2)


def test_L30_the_tokens_of_the_report() -> None:
    text = case_tokenizer().decode([151657, 198, 151658], False)
    assert text == "<tool_call>\n</tool_call>"  # added, not special: the tags are part of the text
    whole = '<tool_call>\n{"name": "f", "arguments": {"cmd": "a{b"}}\n</tool_call>'
    assert parse(whole) == ToolDelta("", [CallDelta(0, "f", '{"cmd": "a{b"}', True)])


def test_L29_a_call_that_is_cut_off_is_not_done() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"cmd": "a'
    assert parse(text) == ToolDelta("", [CallDelta(0, "f", '{"cmd": "a', False)])
    assert parse('<tool_call>\n{"name": "f').content == '<tool_call>\n{"name": "f'


def test_a_call_that_goes_wrong_late_is_told_as_text_too() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": b}}</tool_call>'
    assert parse(text) == ToolDelta(text, [CallDelta(0, "f", '{"a": b}', False)])
    assert [call.index for call in parse(text + f"<tool_call>{F}</tool_call>").calls] == [0, 1]


def test_arguments_go_out_as_they_come() -> None:
    parser = HERMES.make(CONTEXT)
    assert parser.push('Hm.\n<tool_call>\n{"name": "f", ') == ToolDelta("Hm.", [])
    assert parser.push('"arguments": {"a') == ToolDelta("", [CallDelta(0, "f", '{"a')])
    assert parser.push('": "</tool') == ToolDelta("", [CallDelta(0, "", '": "</tool')])
    assert parser.push('_call>"}}') == ToolDelta("", [CallDelta(0, "", '_call>"}')])
    assert parser.push("\n</tool_c") == ToolDelta("", [])
    assert parser.push("all>") == ToolDelta("", [CallDelta(0, done=True)])
    assert parser.finish() == ToolDelta("", [])


def test_content_is_held_back_no_longer_than_a_tag() -> None:
    parser = HERMES.make(CONTEXT)
    assert parser.push("a < b <tool_cal").content == "a < b"
    assert parser.push("m").content == " <tool_calm"


@given(st.lists(PIECES, max_size=14).map("".join), st.sets(st.integers(0, 200)))
@example(f"<tool_call>{F}</tool_call>\n<tool_call>{F} x", {3, 12, 40})
def test_streamed_equals_whole_wherever_it_is_cut(text: str, cuts: set[int]) -> None:
    assert streamed_calls(HERMES, cut(text, cuts)) == parse(text)


@given(st.lists(PIECES, max_size=14).map("".join))
def test_no_character_that_is_no_blank_is_lost(text: str) -> None:
    """What is no whole call stands in the content; of an unfinished one the told part does."""
    found = parse(text)
    if not found.calls:
        assert found.content == text

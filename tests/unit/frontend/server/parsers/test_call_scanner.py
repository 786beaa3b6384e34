"""One call's object, taken in whole and bit by bit."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm.frontend.server.parsers.call_scanner import CallScanner

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


def scanned(text: str, width: int = 1) -> tuple[CallScanner, str, str]:
    """The scanner behind `text`, given so many characters at a time, with the names and the arguments it told."""
    scanner = CallScanner()
    name, arguments = "", ""
    for start in range(0, len(text), width):
        scanner.push(text[start : start + width])
        piece = scanner.take()
        name += piece[0]
        arguments += piece[1]
    return scanner, name, arguments


@given(st.text(st.characters(codec="utf-8"), min_size=1), st.dictionaries(st.text(), JSON_VALUES), st.integers(1, 9))
def test_any_call_comes_out_as_it_stands(name: str, arguments: dict[str, object], width: int) -> None:
    written = json.dumps(arguments).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = f' {{"name": {json.dumps(name)}, "arguments": {written}}}'
    scanner, told_name, told_arguments = scanned(text, width)
    assert (scanner.raw, told_name, told_arguments) == (text, name, written)
    assert scanner.is_whole and scanner.is_announced and not scanner.is_faulty


def test_what_follows_the_object_is_left() -> None:
    scanner = CallScanner()
    assert scanner.push('{"name": "f", "arguments": {}} more') == 30
    assert scanner.is_whole
    assert scanner.push("x") == 0


@pytest.mark.parametrize("width", [1, 4, 100])
def test_arguments_before_the_name_wait_for_it(width: int) -> None:
    scanner, name, arguments = scanned('{"arguments": {"a": [1, "}"]}, "id": 7, "name": "f"}', width)
    assert (name, arguments, scanner.is_whole) == ("f", '{"a": [1, "}"]}', True)


def test_the_name_comes_with_the_first_of_the_arguments() -> None:
    scanner = CallScanner()
    scanner.push('{"name": "f", "parameters": ')
    assert scanner.take() == ("", "")
    scanner.push('{"a')
    assert scanner.take() == ("f", '{"a')
    scanner.push('": 1')
    assert scanner.take() == ("", '": 1')


def test_no_arguments_are_an_empty_object() -> None:
    assert scanned('{"name": "f"}')[1:] == ("f", "{}")


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "{}",
        '{"name": ""}',
        '{"name": 5}',
        '{"name": {"x": "y"}}',
        '{"arguments": {}}',
        '{"name": "f", "arguments": "{}"}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": null}',
        '{"name": "f", "arguments": {"a": b}}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1]}',
        '{"name": "f", "arguments": {"a": "line\nbreak"}}',
        '{"name": "f", "name": "g"}',
        '{"name": "f", "arguments": {}, "parameters": {}}',
        '{"name" "f"}',
        '{"name": tru}',
        '{"x": tru, "name": "f"}',
        '{"name": "f" "arguments": {}}',
        "{" + '"x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
@pytest.mark.parametrize("width", [1, 5, 10**6])
def test_what_is_no_call_is_a_fault_at_the_same_place(text: str, width: int) -> None:
    scanner, _, _ = scanned(text, width)
    assert scanner.is_faulty and not scanner.is_whole
    assert scanner.raw == scanned(text)[0].raw
    assert text.startswith(scanner.raw)

"""Tags cut by a border, and pieces put together."""

import pytest

from folovllm.frontend.server.parsers.base import CallDelta, ToolDelta
from folovllm.frontend.server.parsers.pieces import joined, length_of_tag_begun


@pytest.mark.parametrize(
    "text, length", [("", 0), ("a", 0), ("a<", 1), ("a<ta", 3), ("<tag", 4), ("<<", 1), ("<tag x", 0)]
)
def test_length_of_tag_begun(text: str, length: int) -> None:
    assert length_of_tag_begun(text, "<tag>") == length


def test_each_call_has_one_delta() -> None:
    deltas = [
        ToolDelta("a", [CallDelta(0, "f", "{"), CallDelta(0, arguments="}")]),
        ToolDelta("b", [CallDelta(0, done=True), CallDelta(1, "g")]),
    ]
    assert joined(deltas) == ToolDelta("ab", [CallDelta(0, "f", "{}", True), CallDelta(1, "g")])

"""What parsers share: tags cut by a border, and pieces put together again."""

from collections.abc import Sequence

from folovllm.frontend.server.parsers.base import CallDelta, ToolDelta


def length_of_tag_begun(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`, which is not in it as a whole."""
    most = min(len(text), len(tag) - 1)
    return next((length for length in range(most, 0, -1) if text.endswith(tag[:length])), 0)


def joined(deltas: Sequence[ToolDelta]) -> ToolDelta:
    """All of them as one, each call with one delta."""
    calls: dict[int, CallDelta] = {}
    for piece in (call for delta in deltas for call in delta.calls):
        call = calls.setdefault(piece.index, CallDelta(piece.index))
        call.name += piece.name
        call.arguments += piece.arguments
        call.done |= piece.done
    return ToolDelta("".join([delta.content for delta in deltas]), list(calls.values()))

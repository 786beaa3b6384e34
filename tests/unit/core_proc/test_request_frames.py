"""Frames of new requests of which some are malformed."""

from typing import Any

import msgspec
import pytest

from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.messages.frontend_core import AddRequests, EngineCoreRequest
from folovllm.common.transport import encode
from folovllm.core_proc.request_frames import without_malformed

REQUESTS = [EngineCoreRequest(number, f"r{number}", b"\1\0\0\0", SamplingRow(), 4) for number in (3, 4, 5)]


def raw() -> list[Any]:
    """The frame of REQUESTS as plain values, to be damaged."""
    decoded = msgspec.msgpack.decode(encode(AddRequests(REQUESTS)))
    assert isinstance(decoded, list)
    return decoded


@pytest.mark.parametrize(
    "place, value, field",
    [(1, 7, "request_id"), (2, "a text", "prompt_token_ids"), (4, 1.5, "max_tokens"), (3, [1, 2, {}], "sampling")],
)
def test_one_that_is_malformed_is_refused_and_the_others_are_taken(place: int, value: Any, field: str) -> None:
    values = raw()
    values[1][1][place] = value
    saved = without_malformed(msgspec.msgpack.encode(values))
    assert saved is not None
    right, (refused,) = saved
    assert right == AddRequests([REQUESTS[0], REQUESTS[2]])
    assert (refused.number, refused.kind, refused.field) == (4, "invalid", field)
    assert refused.message.startswith("malformed request: Expected ")


def test_one_that_is_too_short_names_no_field() -> None:
    values = raw()
    values[1] = [[9], *values[1][:1]]
    saved = without_malformed(msgspec.msgpack.encode(values))
    assert saved is not None
    right, (refused,) = saved
    assert right == AddRequests(REQUESTS[:1])
    assert (refused.number, refused.field) == (9, "")


def test_a_reason_that_quotes_the_frame_is_cut() -> None:
    values = raw()
    values[1][0] = [3, "x", b"", {"y" * 2000: 1}, 4]
    saved = without_malformed(msgspec.msgpack.encode(values))
    assert saved is not None
    assert len(saved[1][0].message) < 600


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        ["add"],
        ["add", {}],
        ["add", []],
        ["add", [["no number", "r"]]],
        ["add", [[]]],
        ["add", [5]],
        ["abort", [[3]]],
        [["add"], [[3]]],
        ["add", [[3]], 1],
        raw(),
    ],
)
def test_any_other_frame_is_not_for_it(values: Any) -> None:
    assert without_malformed(msgspec.msgpack.encode(values)) is None


def test_bytes_that_are_no_messagepack() -> None:
    for frame in (b"\xc1", b"", b"\x91" * 5000, b"\xa1\xff"):
        assert without_malformed(frame) is None

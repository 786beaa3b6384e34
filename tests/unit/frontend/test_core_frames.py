"""The core's frames as messages: what is wrong with one request stays with it, what is wrong with all is said."""

from typing import Any

import msgspec
import pytest

from folovllm.common.errors import ProtocolError
from folovllm.common.messages.core_worker import Logprobs
from folovllm.common.messages.frontend_core import (
    EngineCoreOutputs,
    FinishedRequest,
    RejectedRequest,
    RequestPromptLogprobs,
)
from folovllm.common.transport import encode
from folovllm.frontend import int32
from folovllm.frontend.core_frames import FrameReader, logprobs_by_number, tokens_by_number
from tests.fakes.fake_core_for_frontend import logprobs_of

OUTPUTS = EngineCoreOutputs(
    int32.pack([4, 5, 4]),
    int32.pack([10, 11, 12]),
    [FinishedRequest(4, "stop"), FinishedRequest(6, "length")],
    [RejectedRequest(7, "invalid", "too long"), RejectedRequest(8, "queue_full", "later")],
    logprob_rows=int32.pack([0, 2]),
    logprobs=logprobs_of([10, 12], 1),
    prompt_logprobs=[RequestPromptLogprobs(9, 1, logprobs_of([1], 0))],
)
_FINISHED, _REJECTED, _PROMPT = 3, 4, 7  # places in the frame's array, the tag at 0


def raw() -> list[Any]:
    """The frame of OUTPUTS as plain values, to be damaged."""
    decoded = msgspec.msgpack.decode(encode(OUTPUTS))
    assert isinstance(decoded, list)
    return decoded


def read(values: Any) -> tuple[Any, list[int]]:
    return FrameReader().read(msgspec.msgpack.encode(values))


def test_a_frame_that_is_right_is_its_message() -> None:
    message, ended = read(raw())
    assert (message, ended) == (OUTPUTS, [])


@pytest.mark.parametrize(
    "field, place, entry, number",
    [
        (_FINISHED, 0, [4, "no such reason"], 4),
        (_FINISHED, 1, [6], 6),
        (_FINISHED, 1, [6, "stop", "a text"], 6),
        (_FINISHED, 1, [6, "stop", None, "AAAA"], 6),
        (_REJECTED, 0, [7, "invalid", None], 7),
        (_PROMPT, 0, [9, 1, [1, 2]], 9),
    ],
)
def test_a_malformed_entry_ends_its_request_alone(field: int, place: int, entry: list[Any], number: int) -> None:
    values = raw()
    values[field][place] = entry
    message, ended = read(values)
    assert ended == [number]
    first, *others = message.finished
    assert (first.number, first.finish_reason) == (number, "error")
    assert first.error.startswith("the core sent a malformed message of it: ")
    assert [end.number for end in others] == [n for n in (4, 6) if n != number]
    assert [end.number for end in message.rejected] == [n for n in (7, 8) if n != number]
    assert [part.number for part in message.prompt_logprobs] == [n for n in (9,) if n != number]
    assert message.token_ids == OUTPUTS.token_ids
    assert message.logprobs == OUTPUTS.logprobs


@pytest.mark.parametrize(
    "values",
    [
        [],
        {},
        "outputs",
        ["stats", 1],
        ["no such tag"],
        [["outputs"]],
        ["outputs", 1],
        ["outputs", b"", "a text"],
        ["outputs", b"", b"", [["a text", "stop"]]],
        ["outputs", b"", b"", [[]]],
        ["outputs", b"", b"", "no list"],
        ["outputs", 1, b"", [[4, "no such reason"]]],
        ["outputs", b"", b"", [[4, "no such reason"]], [], b"", [b"", b""]],
    ],
)
def test_what_no_request_is_to_blame_for_is_said(values: Any) -> None:
    with pytest.raises(ProtocolError, match="is no valid message"):
        read(values)


def test_bytes_that_are_no_messagepack() -> None:
    for frame in (b"\xc1", b"", b"\x91" * 5000, b"\xa1\xff", encode(OUTPUTS)[:-1]):
        with pytest.raises(ProtocolError, match="is no valid message"):
            FrameReader().read(frame)


def test_tokens_of_each_answer_in_order() -> None:
    assert tokens_by_number(OUTPUTS) == {4: [10, 12], 5: [11]}
    assert [(number, int32.unpack(place.token_ids)) for number, place in logprobs_by_number(OUTPUTS)] == [
        (4, [10, 11]),
        (4, [12, 13]),
    ]
    assert tokens_by_number(EngineCoreOutputs()) == {}
    assert logprobs_by_number(EngineCoreOutputs()) == []


@pytest.mark.parametrize("numbers, token_ids", [([1, 2], [3]), ([], [3])])
def test_tokens_that_nobody_owns(numbers: list[int], token_ids: list[int]) -> None:
    with pytest.raises(ProtocolError, match=rf"{len(token_ids)} tokens of {len(numbers)} numbers"):
        tokens_by_number(EngineCoreOutputs(int32.pack(numbers), int32.pack(token_ids)))
    with pytest.raises(ProtocolError, match="no whole number of int32"):
        tokens_by_number(EngineCoreOutputs(b"abc", b""))


@pytest.mark.parametrize(
    "rows, logprobs",
    [
        ([0], logprobs_of([1, 2], 0)),
        ([1], logprobs_of([1], 0)),
        ([-1], logprobs_of([1], 0)),
        ([0], Logprobs(int32.pack([2]), int32.pack([1]), b"abcd", int32.pack([1]))),
        ([0], Logprobs(int32.pack([0]), b"", b"", int32.pack([1]))),
        ([0], Logprobs(int32.pack([1]), int32.pack([1]), b"abcd", b"")),
    ],
)
def test_log_probabilities_that_do_not_fit(rows: list[int], logprobs: Logprobs) -> None:
    message = EngineCoreOutputs(int32.pack([4]), int32.pack([1]), logprob_rows=int32.pack(rows), logprobs=logprobs)
    with pytest.raises(ProtocolError, match="the core sent"):
        logprobs_by_number(message)

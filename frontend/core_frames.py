"""The core's frames → messages. What is wrong with one request's entry in a frame ends that request and no other.

A frame that does not fit its type is taken apart only then, so a frame that is right costs nothing more. An entry whose
number can be read becomes that request's end; anything else that is wrong spoils the whole frame, as nobody knows whose
tokens were in it.
"""

from typing import Any

import msgspec

from folovllm.common.errors import ProtocolError
from folovllm.common.messages.frontend_core import (
    CoreToFrontend,
    EngineCoreOutputs,
    FinishedRequest,
    RejectedRequest,
    RequestPromptLogprobs,
)
from folovllm.common.transport import Decoder
from folovllm.frontend import int32
from folovllm.frontend.logprobs import Place, places

_ENTRIES: tuple[tuple[str, type[msgspec.Struct]], ...] = (
    ("finished", FinishedRequest),
    ("rejected", RejectedRequest),
    ("prompt_logprobs", RequestPromptLogprobs),
)
_TAG = "outputs"


class FrameReader:
    """Reads the frames of one connection."""

    def __init__(self) -> None:
        self._decoder: Decoder[CoreToFrontend] = Decoder(CoreToFrontend)

    def read(self, frame: bytes) -> tuple[CoreToFrontend, list[int]]:
        """The message, and the numbers of answers that it ends because their own entries were malformed.

        Raises:
            ProtocolError: the frame is no message, and no single request is to blame.
        """
        try:
            return self._decoder.decode(frame), []
        except ProtocolError:
            saved = _saved(frame)
            if saved is None:
                raise
            return saved[0], saved[1]


def _saved(frame: bytes) -> tuple[EngineCoreOutputs, list[int]] | None:
    """The message with malformed entries replaced by errors of their requests; None where that is not possible."""
    try:
        raw = msgspec.msgpack.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(raw, list) or not raw or raw[0] != _TAG:
        return None
    fields = dict(zip(EngineCoreOutputs.__struct_fields__, raw[1:], strict=False))
    failed: list[FinishedRequest] = []
    for name, kind in _ENTRIES:
        parted = _parted(fields.get(name, []), kind)
        if parted is None:
            return None
        fields[name], bad = parted
        failed += bad
    if not failed:
        return None
    try:
        rest = EngineCoreOutputs(**{name: _converted(name, value) for name, value in fields.items()})
    except msgspec.ValidationError:
        return None
    return msgspec.structs.replace(rest, finished=[*failed, *rest.finished]), [entry.number for entry in failed]


def _parted(entries: Any, kind: type[msgspec.Struct]) -> tuple[list[Any], list[FinishedRequest]] | None:
    """Entries that are right, and an end for each of the others; None where one of them names no request."""
    if not isinstance(entries, list):
        return None
    right, failed = [], []
    for entry in entries:
        try:
            right.append(msgspec.convert(entry, kind, builtin_types=(bytes,)))
        except msgspec.ValidationError as error:
            if not isinstance(entry, list) or not entry or not isinstance(entry[0], int):
                return None
            failed.append(FinishedRequest(entry[0], "error", error=f"the core sent a malformed message of it: {error}"))
    return right, failed


def _converted(name: str, value: Any) -> Any:
    """A field that is not one of `_ENTRIES` in its type. Raises msgspec.ValidationError."""
    kinds = {field.name: field.type for field in msgspec.structs.fields(EngineCoreOutputs)}
    return msgspec.convert(value, kinds[name], builtin_types=(bytes,))


def tokens_by_number(outputs: EngineCoreOutputs) -> dict[int, list[int]]:
    """The new tokens of each answer, in order. Raises ProtocolError where they cannot be told apart."""
    numbers, token_ids = int32.unpack(outputs.numbers), int32.unpack(outputs.token_ids)
    if len(numbers) != len(token_ids):
        raise ProtocolError(f"the core sent {len(token_ids)} tokens of {len(numbers)} numbers")
    tokens: dict[int, list[int]] = {}
    for number, token_id in zip(numbers, token_ids, strict=True):
        tokens.setdefault(number, []).append(token_id)
    return tokens


def logprobs_by_number(outputs: EngineCoreOutputs) -> list[tuple[int, Place]]:
    """Log probabilities of new tokens, each with its answer's number. Raises ProtocolError as `tokens_by_number`."""
    if outputs.logprobs is None:
        return []
    numbers, rows = int32.unpack(outputs.numbers), int32.unpack(outputs.logprob_rows)
    found = list(places(outputs.logprobs))
    if len(rows) != len(found) or not all(0 <= row < len(numbers) for row in rows):
        raise ProtocolError(f"the core sent {len(found)} log probabilities for {len(rows)} rows of {len(numbers)}")
    return [(numbers[row], place) for row, place in zip(rows, found, strict=True)]

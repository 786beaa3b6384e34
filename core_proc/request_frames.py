"""A frame of new requests of which some are malformed: the others are taken, those are refused one by one.

Refusing the whole frame would leave a frontend not knowing which of its requests the answer is about.
"""

import re
from typing import Any

import msgspec

from folovllm.common.messages.frontend_core import AddRequests, EngineCoreRequest, RejectedRequest

_TAG = "add"
_PLACE = re.compile(r" - at `\$\[(\d+)\]")
_MAX_REASON_CHARACTERS = 500  # it may quote the frame


def without_malformed(frame: bytes) -> tuple[AddRequests, list[RejectedRequest]] | None:
    """The requests that are right, and refusals of the others; None where the frame is not of this kind.

    None too where a request's number cannot be read: nobody knows then what is refused.
    """
    try:
        raw = msgspec.msgpack.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(raw, list) or len(raw) != 2 or raw[0] != _TAG or not isinstance(raw[1], list):
        return None
    right: list[EngineCoreRequest] = []
    refused: list[RejectedRequest] = []
    for entry in raw[1]:
        try:
            right.append(msgspec.convert(entry, EngineCoreRequest, builtin_types=(bytes,)))
        except msgspec.ValidationError as error:
            if not isinstance(entry, list) or not entry or not isinstance(entry[0], int):
                return None
            refused.append(_refusal(entry, str(error)))
    return (AddRequests(right), refused) if refused else None


def _refusal(entry: list[Any], reason: str) -> RejectedRequest:
    place = _PLACE.search(reason)
    names = EngineCoreRequest.__struct_fields__
    field = names[int(place[1])] if place and int(place[1]) < len(names) else ""
    return RejectedRequest(entry[0], "invalid", f"malformed request: {reason[:_MAX_REASON_CHARACTERS]}", field)

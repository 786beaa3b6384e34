"""Bodies of requests: bounded, strict, and refused in few words."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from folovllm.frontend.server.errors import ApiError

Kind = TypeVar("Kind", bound=msgspec.Struct)

_MAX_IGNORED = 50  # unknown fields of one body that `lenient` passes over
_SHOWN = 200  # characters of a name or message that an error repeats
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`(?: - at `(.*)`)?$", re.DOTALL)
_PLACE = re.compile(r"^(.*?)(?: - at `(?:key in )?(.*)`)?$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Body(Generic[Kind]):
    """A decoded body, and the names of fields that were passed over."""

    value: Kind
    ignored: Sequence[str] = ()


class BodyReader(Generic[Kind]):
    """Reads bodies of one kind."""

    def __init__(self, kind: type[Kind], *, max_bytes: int, lenient: bool) -> None:
        self._kind = kind
        self._decoder = msgspec.json.Decoder(kind)
        self._max_bytes = max_bytes
        self._lenient = lenient

    async def read(self, request: Request) -> Body[Kind]:
        """Raises ApiError: 413 for a body that is too large, 400 naming the field for one that is wrong."""
        return self.decode(await read_bytes(request, self._max_bytes))

    def decode(self, data: bytes) -> Body[Kind]:
        try:
            return Body(self._decoder.decode(data))
        except msgspec.ValidationError as error:
            if self._lenient and _UNKNOWN.match(str(error)):
                return self._without_unknown(data)
            raise _refusal(error) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ApiError(400, f"the body is not valid JSON: {str(error)[:_SHOWN]}", code="invalid_json") from error
        except RecursionError as error:
            raise ApiError(400, "the body is nested too deeply", code="invalid_json") from error

    def _without_unknown(self, data: bytes) -> Body[Kind]:
        """Takes out one unknown field after the other until the rest is valid."""
        raw = msgspec.json.decode(data)
        ignored: list[str] = []
        while True:
            try:
                return Body(msgspec.convert(raw, self._kind), ignored)
            except msgspec.ValidationError as error:
                unknown = _UNKNOWN.match(str(error))
                if unknown is None or len(ignored) == _MAX_IGNORED or not _remove(raw, unknown[2] or "$", unknown[1]):
                    raise _refusal(error) from error
                ignored.append(_param(unknown[2] or "$", unknown[1]))


class FieldCheck:
    """Unknown fields of objects that no Struct describes: refused, or where the server is lenient, noted.

    Attributes:
        ignored: fields that were passed over, those of the body first.
    """

    def __init__(self, body: Body[Any], *, lenient: bool) -> None:
        self.ignored = list(body.ignored)
        self._lenient = lenient

    def check(self, given: Mapping[str, Any], known: Collection[str], where: str) -> None:
        """Clients send objects back with all their nulls, so a null is no field. Raises ApiError 400."""
        unknown = sorted(name for name, value in given.items() if value is not None and name not in known)
        if unknown and not self._lenient:
            param = f"{where}.{unknown[0][:_SHOWN]}"
            raise ApiError(400, f"unknown field {param}", param=param, code="unknown_field")
        self.ignored += [f"{where}.{name[:_SHOWN]}" for name in unknown[:_MAX_IGNORED]]


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises ApiError 413 as soon as it is known to be larger, and 400 where the client hung up."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > max_bytes:
                raise _too_large(max_bytes)
            parts.append(part)
    except ClientDisconnect as error:
        raise ApiError(400, "the client hung up before its body was whole") from error
    return b"".join(parts)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is larger than {max_bytes} bytes (--max-body-mb)", headers={"Connection": "close"})


def _refusal(error: msgspec.ValidationError) -> ApiError:
    text = str(error)
    if unknown := _UNKNOWN.match(text):
        param = _param(unknown[2] or "$", unknown[1])
        return ApiError(400, f"unknown field {param}", param=param, code="unknown_field")
    found = _PLACE.match(text)
    message, place = (found[1], found[2]) if found else (text, None)
    param = _param(place or "$")
    shown = f"{param}: {message[:_SHOWN]}" if param else f"the body is wrong: {message[:_SHOWN]}"
    return ApiError(400, shown, param=param or _missing(message), code="invalid_value")


def _missing(message: str) -> str | None:
    found = re.match(r"Object missing required field `(\w+)`", message)
    return found[1] if found else None


def _param(place: str, field: str = "") -> str:
    """`$.messages[0]` and `role` → `messages[0].role`."""
    path = place.removeprefix("$").removeprefix(".")
    whole = f"{path}.{field}" if path and field else path or field
    return whole if len(whole) <= _SHOWN else whole[:_SHOWN] + "…"


def _remove(raw: Any, place: str, field: str) -> bool:
    """Takes a field out of decoded JSON; False where the place cannot be found (within an object of free keys)."""
    if "[...]" in place:
        return False
    for name, index in _STEP.findall(place):
        raw = raw[int(index)] if index else raw[name]
    del raw[field]
    return True

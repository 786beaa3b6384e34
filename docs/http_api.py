"""The page of the HTTP API: endpoints, and every field of their bodies and answers, out of the server's own Structs."""

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

import msgspec

from docs import generate
from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend.server.app import ENDPOINT_MODULES
from folovllm.frontend.server.bodies import BodyReader
from folovllm.frontend.server.context import ServerContext
from folovllm.frontend.server.endpoint import Endpoint
from folovllm.frontend.server.openapi import errors_of

StructClass = generate.StructClass

_ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.*)$")
_INTRO = (
    "What `folovllm serve` answers; a running server has the same at `/docs`, and as OpenAPI at `/openapi.json`. A "
    "field that is not listed is refused with 400, unless the server was started with `--lenient`. Fields in bold must "
    "be given."
)


class _NoServer:
    """As much of a ServerContext as endpoints ask for when they are made; nothing is ever served."""

    def reader(self, kind: type[msgspec.Struct]) -> BodyReader[msgspec.Struct]:
        return BodyReader(kind, max_bytes=0, lenient=False)


def all_endpoints() -> list[Endpoint]:
    """The endpoints of a server, but for its pages."""
    context = cast("ServerContext", _NoServer())
    return [endpoint for module in ENDPOINT_MODULES for endpoint in module.endpoints(context)]


def http_api_page() -> str:
    endpoints = all_endpoints()
    bodies = _with_parts([endpoint.body for endpoint in endpoints if endpoint.body])
    answers = _with_parts([kind for e in endpoints for kind in (e.answer, *e.events, *_errors(e).values()) if kind])
    rest = [kind for kind in answers if kind not in bodies]
    parts = ["## Endpoints", *map(_endpoint, endpoints)]
    parts += ["## Bodies", *(part for kind in bodies for part in _described(kind))]
    parts += ["## Answers", *(part for kind in rest for part in _described(kind))]
    return generate.page("HTTP API", "`frontend/server/`", _INTRO, *parts)


def _errors(endpoint: Endpoint) -> dict[int, StructClass]:
    return {status: kind for status, (_, kind) in errors_of(endpoint, endpoint.path).items()}


def _endpoint(endpoint: Endpoint) -> str:
    lines = [f"**`{endpoint.method} {endpoint.path.replace(':path}', '}')}`** {endpoint.summary}."]
    if endpoint.body is not None:
        lines.append(f"Body: {_link(endpoint.body)}.")
    if endpoint.answer is not None:
        lines.append(f"Answer: {_link(endpoint.answer)}.")
    if endpoint.events:
        lines.append(f"Events of its stream: {', '.join(map(_link, endpoint.events))}.")
    if errors := _errors(endpoint):
        lines.append(f"Errors: {', '.join(map(str, errors))}.")
    return " ".join(lines)


def _link(kind: StructClass) -> str:
    return f"[{kind.__name__}](#{kind.__name__.lower()})"


def _with_parts(kinds: Sequence[StructClass]) -> list[StructClass]:
    """Each Struct once, behind it those that its fields hold."""
    found: dict[StructClass, None] = {}

    def add(kind: StructClass) -> None:
        if kind not in found:
            found[kind] = None
            for field in msgspec.structs.fields(kind):
                for part in generate.structs_in(field.type):
                    add(part)

    for kind in kinds:
        add(kind)
    return list(found)


def _described(kind: StructClass) -> Iterator[str]:
    yield f"### {kind.__name__}"
    yield from map(generate.prose, _paragraphs(kind))
    fields = msgspec.structs.fields(kind)
    rows = [_row(kind, field) for field in fields]
    if any(meaning for _, _, meaning in rows):
        yield generate.table(["field", "type", "meaning"], rows)
    elif rows:
        yield generate.table(["field", "type"], [row[:2] for row in rows])


def _row(kind: StructClass, field: msgspec.structs.FieldInfo) -> list[str]:
    name = f"**`{field.encode_name}`**" if field.required else f"`{field.encode_name}`"
    shown = f"`{generate.type_name(field.type)}`"
    parts = generate.structs_in(field.type)
    if len(parts) == 1:
        shown = f"[{shown}](#{parts[0].__name__.lower()})"
    return [name, shown, generate.prose(meaning_of(kind, field.name))]


def meaning_of(kind: StructClass, name: str) -> str:
    """What a docstring says of a field: the Struct's own, that of one it extends, or that of SamplingParams."""
    for owner in (*kind.__mro__, SamplingParams):
        if found := attributes(owner.__doc__ or "").get(name):
            return found
    return ""


def attributes(docstring: str) -> dict[str, str]:
    """The entries of its Attributes section; several names may share one."""
    blocks = inspect.cleandoc(docstring).split("\n\n")
    lines = next((block.splitlines()[1:] for block in blocks if block.startswith("Attributes:\n")), [])
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        if entry := _ENTRY.match(line):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _paragraphs(kind: StructClass) -> list[str]:
    blocks: list[Any] = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
    return [" ".join(block.split()) for block in blocks if block and not block.startswith("Attributes:\n")]

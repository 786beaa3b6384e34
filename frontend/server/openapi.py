"""The OpenAPI document, made of the endpoints' Structs, and a page for people made of the document."""

from collections.abc import Sequence
from typing import Any

import jinja2
import msgspec

import folovllm
from folovllm.frontend.server.endpoint import Endpoint
from folovllm.frontend.server.errors import ANTHROPIC_PREFIX
from folovllm.frontend.server.gate import OPEN_PATHS
from folovllm.frontend.server.protocol.common import ErrorAnswer
from folovllm.frontend.server.protocol.messages import MessagesErrorAnswer

_REFERENCE = "#/components/schemas/{name}"
_JSON = "application/json"
_STREAM = "text/event-stream"
_ERRORS_OF_BODIES = {
    400: "A field, or the prompt's length, is wrong",
    404: "No such model",
    413: "The body is too large",
    500: "The request failed within the engine",
    503: "The queue is full, the server drains, or the engine is gone",
}
_NO_KEY = "No API key, or a wrong one"


def openapi_document(endpoints: Sequence[Endpoint], *, with_keys: bool, root_path: str) -> dict[str, Any]:
    """The document, as plain JSON values.

    Args:
        endpoints: all of a server.
        with_keys: whether the server asks for API keys.
        root_path: where a proxy serves it.
    """
    structs = [kind for endpoint in endpoints for kind in (endpoint.body, endpoint.answer, *endpoint.events) if kind]
    unique = list(dict.fromkeys([*structs, ErrorAnswer, MessagesErrorAnswer]))
    _, components = msgspec.json.schema_components(unique, ref_template=_REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = endpoint.path.replace(":path}", "}")
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, path, with_keys)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "FoloVLLM", "version": folovllm.__version__},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {"schemas": components},
    }
    if with_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _operation(endpoint: Endpoint, path: str, with_keys: bool) -> dict[str, Any]:
    asks_for_key = with_keys and path not in OPEN_PATHS
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": f"{endpoint.method.lower()}{path.replace('/', '_').replace('{', '').replace('}', '')}",
        "responses": {"200": _answer(endpoint), **_errors(endpoint, path, asks_for_key)},
    }
    if "{" in path:
        name = path.partition("{")[2].partition("}")[0]
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
    if endpoint.body is not None:
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": _reference(endpoint.body)}}}
    if asks_for_key:
        operation["security"] = [{"key": []}]
    return operation


def _answer(endpoint: Endpoint) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if endpoint.answer is not None:
        content[_JSON] = {"schema": _reference(endpoint.answer)}
    if endpoint.events:
        content[_STREAM] = {"schema": {"anyOf": [_reference(kind) for kind in endpoint.events]}}
    return {
        "description": "The answer" + ("; with stream=true, events" if content.get(_STREAM) else ""),
        "content": content,
    }


def errors_of(endpoint: Endpoint, path: str) -> dict[int, tuple[str, type[msgspec.Struct]]]:
    """Status → what it means and what the answer holds; the missing key, which any path may have, is left out."""
    usual = _usual_error(path)
    found: dict[int, tuple[str, type[msgspec.Struct]]] = {}
    if endpoint.body is not None:
        found = {status: (text, usual) for status, text in _ERRORS_OF_BODIES.items()}
    return found | {status: (_ERRORS_OF_BODIES[status], kind) for status, kind in endpoint.errors}


def _usual_error(path: str) -> type[msgspec.Struct]:
    return MessagesErrorAnswer if path.startswith(ANTHROPIC_PREFIX) else ErrorAnswer


def _errors(endpoint: Endpoint, path: str, asks_for_key: bool) -> dict[str, Any]:
    found = errors_of(endpoint, path) | ({401: (_NO_KEY, _usual_error(path))} if asks_for_key else {})
    return {
        str(status): {"description": text, "content": {_JSON: {"schema": _reference(kind)}}}
        for status, (text, kind) in sorted(found.items())
    }


def _reference(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(name=kind.__name__)}


def docs_page(document: dict[str, Any]) -> str:
    """The document as HTML: endpoints, and the fields of every body. It needs no script and no other file."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["kind"] = _kind
    return environment.from_string(_PAGE).render(document=document)


def _kind(schema: dict[str, Any]) -> str:
    """A schema in a few words; names of others are links on the page."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[1]
    if "anyOf" in schema:
        return " | ".join(_kind(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(repr(value) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "anything"))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>FoloVLLM API</title>
<style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 13px/1.5 ui-monospace, monospace }
pre { white-space: pre-wrap } table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .2rem .6rem; border-bottom: 1px solid #8884 }
h3 { margin: 2rem 0 .3rem }
</style></head><body>
<h1>FoloVLLM {{ document.info.version }}</h1>
<p>The machine-readable form is <a href="openapi.json">openapi.json</a>.</p>
<h2>Endpoints</h2>
<table><tr><th>method</th><th>path</th><th>what it does</th><th>body</th></tr>
{% for path, operations in document.paths.items() %}{% for method, operation in operations.items() %}
<tr><td><code>{{ method | upper }}</code></td><td><code>{{ path }}</code></td><td>{{ operation.summary }}</td>
<td>{% if operation.requestBody %}{% set name = operation.requestBody.content["application/json"].schema | kind %}
<a href="#{{ name }}">{{ name }}</a>{% endif %}</td></tr>
{% endfor %}{% endfor %}
</table>
<h2>Bodies and answers</h2>
{% for name, schema in document.components.schemas.items() %}
<h3 id="{{ name }}">{{ name }}</h3>
<pre>{{ schema.description }}</pre>
<table><tr><th>field</th><th>kind</th></tr>
{% for field, kind in (schema.properties or {}).items() %}
<tr><td><code>{{ field }}</code>{{ " *" if field in (schema.required or []) }}</td>
<td><code>{{ kind | kind }}</code></td></tr>
{% endfor %}
</table>
{% endfor %}
</body></html>
"""

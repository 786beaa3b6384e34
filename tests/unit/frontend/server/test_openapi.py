"""The OpenAPI document and its page."""

import re
from typing import Any

from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, run


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*[references(item) for item in value.values()])
    return set().union(*[references(item) for item in value]) if isinstance(value, list) else set()


def test_the_document_describes_every_endpoint(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        document = (await server.http.get("/openapi.json")).json()
        assert document["openapi"] == "3.1.0"
        assert {"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/models/{model}"} <= set(
            document["paths"]
        )
        names = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
        assert references(document) <= names
        chat = document["paths"]["/v1/chat/completions"]["post"]
        assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        assert document["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False
        error = document["paths"]["/v1/messages"]["post"]["responses"]["400"]["content"]["application/json"]
        assert error["schema"]["$ref"].endswith("/MessagesErrorAnswer")
        assert "securitySchemes" not in document["components"]

    run(core.endpoint, scenario)


def test_keys_and_root_path_are_told(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        document = (await server.http.get("/openapi.json", headers={"X-Api-Key": "k"})).json()
        assert document["servers"] == [{"url": "/llm"}]
        assert document["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
        assert "401" in document["paths"]["/v1/models"]["get"]["responses"]
        health = document["paths"]["/health"]["get"]
        assert "security" not in health
        assert list(health["responses"]) == ["200", "503"]

    run(core.endpoint, scenario, api_keys=("k",), root_path="/llm")


def test_the_page_needs_nothing_else_and_its_links_lead_somewhere(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        answer = await server.http.get("/docs")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        page = answer.text
        assert "<script" not in page
        assert re.findall(r'(?:src|href)="[a-z]+:', page) == []
        targets = set(re.findall(r'href="#(\w+)"', page))
        assert (
            {"ChatRequest", "CompletionRequest", "MessagesRequest"} <= targets <= set(re.findall(r'id="(\w+)"', page))
        )

    run(core.endpoint, scenario)

"""Routes, keys, ids and error forms of the application, over a fake core."""

import pathlib

import httpx
import pytest
from starlette.routing import Route

from folovllm.common.errors import ConfigError
from folovllm.frontend.server.options import ServerOptions
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import BASE_URL, Served, run
from tests.sources import ROOT

PAGE_FILES = sorted((ROOT / "frontend/server/page").iterdir())


def test_models_and_version(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        listed = (await server.http.get("/v1/models")).json()
        assert [card["id"] for card in listed["data"]] == ["tiny", "alias"]
        assert {card["root"] for card in listed["data"]} == {"tiny"}
        assert listed["data"][0]["max_model_len"] == 64
        assert (await server.http.get("/v1/models/alias")).json()["id"] == "alias"
        assert (await server.http.get("/v1/models/other")).status_code == 404
        assert (await server.http.get("/version")).json()["version"]

    run(core.endpoint, scenario, served_model_names=("tiny", "alias"))


def test_the_models_folder_is_its_name_unless_one_is_given(core: FakeCore, model_folder: pathlib.Path) -> None:
    async def scenario(server: Served) -> None:
        assert (await server.http.get("/v1/models")).json()["data"][0]["id"] == model_folder.name

    run(core.endpoint, scenario, served_model_names=())


OPEN = {"/health", "/ready", "/"} | {f"/page/{file.name}" for file in PAGE_FILES if file.name != "index.html"}


def test_L27_every_route_but_a_few_asks_for_a_key(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        paths = {route.path: route.methods or set() for route in server.app.routes if isinstance(route, Route)}
        assert len(paths) > 6
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": "k"}, {"Authorization": "Basic key-1"}):
            for path, methods in paths.items():
                for method in methods:
                    status = (await server.http.request(method, path, headers=headers)).status_code
                    assert status == (200 if path in OPEN else 401), (method, path)
            for path in (
                "//v1/models",
                "/V1/models",
                "/nowhere",
                "/health/",
                "//health",
                "/metrics",
                "/docs",
                "/page/x",
            ):
                assert (await server.http.get(BASE_URL + path, headers=headers)).status_code == 401, path
            assert (await server.http.options("/v1/models", headers=headers)).status_code == 401
        refused = await server.http.get("/v1/models")
        assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"

    run(core.endpoint, scenario, api_keys=("key-1", "key-2"))


@pytest.mark.parametrize(
    "headers", [{"Authorization": "Bearer key-1"}, {"authorization": "bearer key-2"}, {"x-api-key": "key-2"}]
)
def test_any_of_the_keys_opens(core: FakeCore, headers: dict[str, str]) -> None:
    async def scenario(server: Served) -> None:
        assert (await server.http.get("/v1/models", headers=headers)).status_code == 200

    run(core.endpoint, scenario, api_keys=("key-1", "key-2"))


def test_errors_of_the_router_have_the_same_form(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        missing = await server.http.get("/nowhere")
        assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
        wrong_method = await server.http.get("/tokenize")
        assert (wrong_method.status_code, wrong_method.json()["error"]["param"]) == (405, None)
        anthropic = await server.http.get("/v1/messages/nowhere")
        assert anthropic.json()["type"] == "error"

    run(core.endpoint, scenario)


def test_a_bug_is_an_internal_error_with_its_id(core: FakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(server: Served) -> None:
        monkeypatch.setattr(type(server.llm), "render_chat", lambda *_, **__: 1 / 0)
        answer = await server.post(
            "/tokenize", {"messages": [{"role": "user", "content": "x"}]}, **{"X-Request-Id": "r"}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert answer.headers["X-Request-Id"] == "r"
        assert "division" not in answer.text

    run(core.endpoint, scenario)


def test_request_ids(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        given = await server.http.get("/version", headers={"X-Request-Id": "mine-7"})
        assert given.headers["X-Request-Id"] == "mine-7"
        made = [(await server.http.get("/version")).headers["X-Request-Id"] for _ in range(2)]
        assert len(set(made)) == 2
        unusable = await server.http.get("/version", headers={"X-Request-Id": "a b" * 100})
        assert len(unusable.headers["X-Request-Id"]) == 32

    run(core.endpoint, scenario)


def test_cors(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        ask = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        preflight = await server.http.options("/v1/models", headers=ask)
        assert preflight.headers["Access-Control-Allow-Origin"] == "https://page.example"
        assert (await server.http.get("/v1/models", headers=ask)).status_code == 401
        foreign = await server.http.options("/v1/models", headers=ask | {"Origin": "https://other.example"})
        assert "Access-Control-Allow-Origin" not in foreign.headers

    run(core.endpoint, scenario, api_keys=("key",), cors_origins=("https://page.example",))


def test_a_path_behind_a_proxy(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        transport = httpx.ASGITransport(app=server.app, root_path="/llm")
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as proxied:
            assert (await proxied.get("/llm/health")).status_code == 200
            assert (await proxied.get("/llm/v1/models")).status_code == 401
            good = await proxied.get("/llm/v1/models", headers={"X-Api-Key": "key"})
            assert good.status_code == 200

    run(core.endpoint, scenario, api_keys=("key",), root_path="/llm")


@pytest.mark.parametrize("option", ["tool_parser", "reasoning_parser"])
def test_a_parser_that_does_not_exist_is_refused(core: FakeCore, option: str) -> None:
    async def scenario(server: Served) -> None:
        raise AssertionError("the application was made")

    with pytest.raises(ConfigError, match=f"{option}='nope' is not known; choose one of auto, none"):
        run(core.endpoint, scenario, **{option: "nope"})


@pytest.mark.parametrize(
    "options",
    [
        {"port": 70000},
        {"max_body_mb": 0.0},
        {"ssl_certfile": "cert.pem"},
        {"root_path": "llm"},
        {"root_path": "/llm/"},
        {"api_keys": ("",)},
        {"api_keys": ("schlüssel",)},
        {"stream_interval": 0},
        {"api_server_count": 0},
        {"lenient": 1},
    ],
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ServerOptions(**options)  # type: ignore[arg-type]

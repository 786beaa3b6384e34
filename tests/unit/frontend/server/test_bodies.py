"""Bodies of the wrong kind, unknown fields, and sizes."""

import json
from typing import Any

import pytest

from folovllm.frontend.server.bodies import BodyReader
from folovllm.frontend.server.errors import ApiError
from folovllm.frontend.server.protocol.chat import ChatRequest
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, run

HELLO = {"role": "user", "content": "hi"}


def reader(*, lenient: bool = False) -> BodyReader[ChatRequest]:
    return BodyReader(ChatRequest, max_bytes=1000, lenient=lenient)


def refusal(data: bytes, *, lenient: bool = False) -> ApiError:
    with pytest.raises(ApiError) as caught:
        reader(lenient=lenient).decode(data)
    return caught.value


@pytest.mark.parametrize(
    "data, param, code",
    [
        (b"[]", None, "invalid_value"),
        (b"null", None, "invalid_value"),
        (b"1", None, "invalid_value"),
        (b'"x"', None, "invalid_value"),
        (b"{", None, "invalid_json"),
        (b"", None, "invalid_json"),
        (b"{}", "messages", "invalid_value"),
        (b'{"messages":"hi"}', "messages", "invalid_value"),
        (b'{"messages":[1,2]}', "messages[0]", "invalid_value"),
        (b'{"messages":[{"content":"x"}]}', "messages[0]", "invalid_value"),
        (b'{"messages":[{"role":"user","content":{}}]}', "messages[0].content", "invalid_value"),
        (b'{"messages":[{"role":"user","colour":1}]}', "messages[0].colour", "unknown_field"),
        (b'{"messages":[],"temprature":1}', "temprature", "unknown_field"),
        (b'{"messages":[],"temperature":"0.5"}', "temperature", "invalid_value"),
        (b'{"messages":[],"temperature":NaN}', None, "invalid_json"),
        (b'{"messages":[],"temperature":1e999}', "temperature", "invalid_value"),
        (b'{"messages":[],"logit_bias":{"5":"x"}}', "logit_bias[...]", "invalid_value"),
        (b'{"messages":[{"role":"user","content":"\xff"}]}', None, "invalid_json"),
        (b'{"messages":[{"role":"user","content":"\\ud800"}]}', None, "invalid_json"),
        (b'{"messages":[{"role":"user","content":[' + b"[" * 5000 + b"]]}]}", None, None),
    ],
)
def test_L26_the_place_is_named(data: bytes, param: str | None, code: str | None) -> None:
    error = refusal(data)
    assert error.status == 400
    assert len(str(error)) < 500
    if code is not None:
        assert (error.param, error.code) == (param, code)


def test_unknown_fields_are_passed_over_only_if_asked() -> None:
    data = json.dumps({"messages": [HELLO | {"x": 1}, HELLO], "y": {"z": 2}, "temperature": 0.5}).encode()
    assert refusal(data).code == "unknown_field"
    body = reader(lenient=True).decode(data)
    assert sorted(body.ignored) == ["messages[0].x", "y"]
    assert body.value.temperature == 0.5
    assert [message.content for message in body.value.messages] == ["hi", "hi"]


def test_lenient_is_no_less_strict_about_values() -> None:
    assert refusal(b'{"messages":[],"y":1,"temperature":"x"}', lenient=True).param == "temperature"
    many = json.dumps({"messages": [], **{f"f{i}": 1 for i in range(60)}}).encode()
    assert refusal(many, lenient=True).code == "unknown_field"


def test_ignored_fields_are_listed_in_a_header(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        body = {"messages": [HELLO], "max_tokens": 1, "a\r\nb": 1, "größe": 2}
        answer = await server.post("/v1/chat/completions", body)
        assert answer.status_code == 200
        assert answer.headers["X-Ignored-Fields"] == "a\\r\\nb, gr\\xf6\\xdfe"
        stream = await server.post("/v1/chat/completions", body | {"stream": True})
        assert stream.headers["X-Ignored-Fields"] == "a\\r\\nb, gr\\xf6\\xdfe"

    run(core.endpoint, scenario, lenient=True)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": 1, "content": "x" * 50}] * 12_000,
        "hi" * 100_000,
        [{"role": "user", "content": "hi", "k" * 100_000: 1}],
        [{"role": "user" * 100_000, "content": "hi"}],
    ],
)
def test_L26_a_large_wrong_body_gets_a_small_answer(core: FakeCore, messages: Any) -> None:
    async def scenario(server: Served) -> None:
        answer = await server.post("/v1/chat/completions", {"messages": messages})
        assert answer.status_code == 400
        assert len(answer.content) < 10_000
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert core.requests == []

    run(core.endpoint, scenario)


@pytest.mark.parametrize("announced", [True, False])
def test_L26_a_body_that_is_too_large(core: FakeCore, announced: bool) -> None:
    async def pieces() -> Any:
        for _ in range(100):
            yield b" " * 10_000

    async def scenario(server: Served) -> None:
        content = b" " * 1_000_000 if announced else pieces()
        answer = await server.http.post("/v1/chat/completions", content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "request_too_large"
        assert (await server.post("/tokenize", {"prompt": "hi"})).status_code == 200

    run(core.endpoint, scenario, max_body_mb=0.5)

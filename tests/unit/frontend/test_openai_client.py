"""The blocking client against servers that follow a script: what it sends, what it reads, how it tells of errors."""

import socket
import threading
from collections.abc import Iterator

import pytest

from folovllm.common.errors import ConfigError, EngineDeadError, QueueFullError, RequestError, RequestFailedError
from folovllm.frontend.openai_client import ChatDelta, OpenAIClient
from tests.fakes.scripted_server import Answer, Asked, ScriptedServer, as_json, chat_events, events, models

MESSAGES = [{"role": "user", "content": "hi"}]


def answering(answer: Answer) -> ScriptedServer:
    return ScriptedServer(lambda _: answer)


def all_deltas(client: OpenAIClient) -> list[ChatDelta]:
    with client.stream_chat("m", MESSAGES, {"temperature": 0}) as deltas:
        return list(deltas)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_models(suffix: str) -> None:
    with answering(models("a", "b")) as server:
        assert OpenAIClient(server.url + suffix).models() == ["a", "b"]
        assert [asked.path for asked in server.asked] == ["/v1/models"]
        assert "Authorization" not in server.asked[0].headers


def test_a_path_in_front_and_a_key() -> None:
    with answering(models("a")) as server:
        OpenAIClient(server.url + "/llm/v1", "secret").models()
        assert server.asked[0].path == "/llm/v1/models"
        assert server.asked[0].headers["Authorization"] == "Bearer secret"


def test_a_stream() -> None:
    with answering(chat_events("a", "b", reason="length", tokens=9)) as server:
        deltas = all_deltas(OpenAIClient(server.url))
        (asked,) = server.asked
    assert [delta.text for delta in deltas] == ["", "a", "b", "", ""]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "length", None]
    assert deltas[-1] == ChatDelta(num_tokens=9)
    assert asked.path == "/v1/chat/completions"
    assert asked.body == {
        "model": "m",
        "messages": MESSAGES,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_and_comments(name: str) -> None:
    chunk = {"choices": [{"delta": {name: "hm", "content": None}}]}
    with answering(Answer([b": keep-alive\n\n", *events(chunk, "[DONE]").parts])) as server:
        assert all_deltas(OpenAIClient(server.url)) == [ChatDelta(reasoning="hm")]


def test_a_delta_is_there_before_the_next_is_made() -> None:
    go_on = threading.Event()

    def parts() -> Iterator[bytes]:
        first, second, *rest = chat_events("a").parts
        yield from (first, second)
        assert go_on.wait(30)
        yield from rest

    with (
        ScriptedServer(lambda _: Answer(parts())) as server,
        OpenAIClient(server.url).stream_chat("m", MESSAGES, {}) as deltas,
    ):
        assert [next(deltas).text, next(deltas).text] == ["", "a"]
        go_on.set()
        assert len(list(deltas)) == 2


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "http://[::1"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ConfigError, match="is no URL"):
        OpenAIClient(url)


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://host/v1?api-version=1", r"ends with '\?api-version=1', which is not sent"),
        ("http://host/#top", "ends with '#top', which is not sent"),
        ("http://user:hidden@host", "holds a user or a password, which is not sent; give a key by --api-key"),
        ("http://user@host", "holds a user"),
    ],
)
def test_parts_of_a_url_that_would_be_dropped(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        OpenAIClient(url)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
def test_a_silent_server_lists_no_models_for_ever(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("folovllm.frontend.openai_client._TIMEOUT_S", 0.2)
    is_told = threading.Event()

    def speak(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(begun)
            is_told.wait(30)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=speak, args=(listener,))
        thread.start()
        with pytest.raises(EngineDeadError, match=r"no server answers at .*: timed out"):
            OpenAIClient(f"http://127.0.0.1:{listener.getsockname()[1]}").models()
        is_told.set()
        thread.join(30)


def test_a_stream_may_be_silent_for_longer_than_a_list_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("folovllm.frontend.openai_client._TIMEOUT_S", 0.05)

    def parts() -> Iterator[bytes]:
        first, *rest = chat_events("a").parts
        yield first
        threading.Event().wait(0.1)  # twice as long; a slower machine makes it only longer
        yield from rest

    with ScriptedServer(lambda _: Answer(parts())) as server:
        assert [delta.text for delta in all_deltas(OpenAIClient(server.url))] == ["", "a", "", ""]


def test_a_fault_of_the_callers_own_is_not_the_servers() -> None:
    def show(client: OpenAIClient) -> None:
        with client.stream_chat("m", MESSAGES, {}) as deltas:
            next(deltas)
            raise BrokenPipeError("our own output")

    with answering(chat_events("a")) as server, pytest.raises(BrokenPipeError, match="our own output"):
        show(OpenAIClient(server.url))


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EngineDeadError, match=f"no server answers at {url}: Connection refused"):
            OpenAIClient(url).models()


def test_no_http_server() -> None:
    def speak(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"220 mail.example ESMTP\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=speak, args=(listener,))
        thread.start()
        with pytest.raises(EngineDeadError, match="no HTTP server"):
            OpenAIClient(f"http://127.0.0.1:{listener.getsockname()[1]}").models()
        thread.join(30)


def test_plain_http_where_tls_was_asked_for() -> None:
    with answering(models("a")) as server, pytest.raises(EngineDeadError, match="SSL"):
        OpenAIClient(server.url.replace("http:", "https:")).models()


@pytest.mark.parametrize(
    "answer, message",
    [
        (Answer([b"<html>hello"], kind="text/html"), "no OpenAI-compatible server: GET /v1/models .*200 and text/html"),
        (as_json({"error": "no such path"}, 404), "no OpenAI-compatible server: GET /v1/models .* status 404"),
        (as_json({"models": []}), "no OpenAI-compatible server"),
        (models(), "has no model"),
        (as_json({"error": {"message": "wrong key"}}, 401), "answers 401: wrong key; give its key with --api-key"),
    ],
)
def test_what_lists_no_models(answer: Answer, message: str) -> None:
    with answering(answer) as server, pytest.raises(ConfigError, match=message):
        OpenAIClient(server.url).models()


@pytest.mark.parametrize(
    "answer, kind, message",
    [
        (as_json({"error": {"message": "no key"}}, 401), ConfigError, "answers 401: no key; give its key"),
        (as_json({"error": {"message": "no model m"}}, 404), ConfigError, "answers 404: no model m$"),
        (as_json({"error": {"message": "bad top_p"}}, 400), RequestError, "answers 400: bad top_p"),
        (as_json({"detail": "odd"}, 422), RequestError, "answers 422: .*odd"),
        (as_json({"error": "in a text"}, 400), RequestError, "answers 400: in a text"),
        (as_json({"message": "without an object"}, 400), RequestError, "answers 400: without an object"),
        (as_json({"error": {"message": "broken"}}, 500), RequestFailedError, "answers 500: broken"),
        (Answer([b"x" * 5000], 502), RequestFailedError, "answers 502: x{300} …$"),
        (Answer([], 500), RequestFailedError, "answers 500: Internal Server Error"),
    ],
)
def test_refusals(answer: Answer, kind: type[Exception], message: str) -> None:
    with answering(answer) as server, pytest.raises(kind, match=message):
        all_deltas(OpenAIClient(server.url))


@pytest.mark.parametrize("headers, wait_s", [({"Retry-After": "7"}, 7.0), ({}, 5.0)])
@pytest.mark.parametrize("status", [429, 503])
def test_a_full_server_says_when_to_try_again(headers: dict[str, str], wait_s: float, status: int) -> None:
    full = as_json({"error": {"message": "full"}}, status, **headers)
    with answering(full) as server, pytest.raises(QueueFullError, match="full") as caught:
        all_deltas(OpenAIClient(server.url))
    assert caught.value.retry_after_s == wait_s


@pytest.mark.parametrize("error", [{"message": "out of paper"}, "out of paper"])
def test_an_error_behind_the_first_token(error: object) -> None:
    answer = events({"choices": [{"delta": {"content": "a"}}]}, {"error": error})
    with answering(answer) as server, pytest.raises(RequestFailedError, match="the server failed: out of paper"):
        all_deltas(OpenAIClient(server.url))


def test_a_stream_of_something_else() -> None:
    with answering(events("hello")) as server, pytest.raises(ConfigError, match="else than OpenAI's chunks: hello"):
        all_deltas(OpenAIClient(server.url))


def test_a_connection_that_breaks_off() -> None:
    def parts(asked: Asked) -> Iterator[bytes]:
        yield next(iter(chat_events("a").parts))
        raise ConnectionAbortedError("the server goes away")

    with (
        ScriptedServer(lambda asked: Answer(parts(asked))) as server,
        pytest.raises(EngineDeadError, match=r"the connection to .* broke off"),
    ):
        all_deltas(OpenAIClient(server.url))

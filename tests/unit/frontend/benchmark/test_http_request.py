"""One request of a load: what is sent, what is noted of the answer, wherever it is cut."""

import asyncio
import json
import socket
from typing import Any

import pytest

from folovllm.frontend.benchmark.http_request import PATHS, Backend, EventReader, Record, Target, new_session, send
from folovllm.frontend.benchmark.workload import Work
from tests.fakes.scripted_server import Answer, ScriptedServer, as_json, chat_events, events

WORK = Work("hello you", 2, 9)


def target(url: str, backend: Backend = "chat", **fields: Any) -> Target:
    return Target(url + PATHS[backend], backend, "m", "k", fields)


def sent_to(answer: Answer, backend: Backend = "chat", **fields: Any) -> tuple[Record, ScriptedServer]:
    with ScriptedServer(lambda _: answer) as server:
        return send_one(target(server.url, backend, **fields)), server


def send_one(where: Target) -> Record:
    async def one() -> Record:
        record = Record(WORK)
        async with new_session(where) as session:
            await asyncio.wait_for(send(session, where, record), 60)
        return record

    return asyncio.run(one())


def text_events(*texts: str, usage: Any = None) -> Answer:
    return events(*({"choices": [{"index": 0, "text": text}]} for text in texts), {"choices": [], "usage": usage})


def test_a_chat() -> None:
    record, server = sent_to(chat_events("a", "b", "c", tokens=7), temperature=0)
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions" and asked.headers["Authorization"] == "Bearer k"
    assert asked.headers["Accept-Encoding"] == "identity", "what is compressed is not read"
    assert asked.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello you"}],
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
    }
    assert (record.error, record.prompt_tokens, record.output_tokens) == ("", 5, 7)
    assert len(record.times) == 3, "the role, the finish reason and the usage are no tokens"
    assert record.sent <= record.times[0] <= record.times[1] <= record.times[2]


def test_a_text() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    record, server = sent_to(text_events("a", "", "b", usage=usage), "completions")
    assert server.asked[0].path == "/v1/completions"
    assert server.asked[0].body["prompt"] == "hello you" and "messages" not in server.asked[0].body
    assert (len(record.times), record.prompt_tokens, record.output_tokens) == (2, 3, 4)


def test_fields_win_over_ours() -> None:
    _, server = sent_to(chat_events("a"), max_tokens=None, top_k=3)
    assert (server.asked[0].body["max_tokens"], server.asked[0].body["top_k"]) == (None, 3)


def test_a_server_that_does_not_count() -> None:
    record, _ = sent_to(text_events("a", "b", usage=None), "completions")
    assert (record.prompt_tokens, record.output_tokens) == (2, 2)


@pytest.mark.parametrize(
    "delta, is_news",
    [
        ({"content": "a"}, True),
        ({"content": ""}, False),
        ({"content": None, "role": "assistant"}, False),
        ({"reasoning_content": "a"}, True),
        ({"reasoning": "a"}, True),
        ({"tool_calls": [{"index": 0}]}, True),
        ({"tool_calls": []}, False),
        ({"tool_calls": None}, False),
    ],
)
def test_what_is_news(delta: dict[str, Any], is_news: bool) -> None:
    record = Record(WORK)
    event = {"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    EventReader(record).take(f"data: {json.dumps(event)}\n\n".encode(), 5.0)
    assert record.times == ([5.0] if is_news else [])


def test_events_are_read_wherever_they_are_cut() -> None:
    whole = b": keep-alive\n\n" + b"".join(chat_events("a", "b", tokens=2).parts).replace(b"\n", b"\r\n")
    for cut in range(1, len(whole), 7):
        record = Record(WORK)
        reader = EventReader(record)
        reader.take(whole[:cut], 1.0)
        reader.take(whole[cut:], 2.0)
        reader.finish()
        assert (len(record.times), record.output_tokens, record.error) == (2, 2, "")
        assert record.times == sorted(record.times)


def test_events_of_one_piece_have_one_time() -> None:
    record = Record(WORK)
    EventReader(record).take(b"".join(chat_events("a", "b", "c").parts), 4.0)
    assert record.times == [4.0, 4.0, 4.0]


@pytest.mark.parametrize(
    "answer, error",
    [
        (as_json({"error": {"message": "no such model"}}, 404), 'status 404: {"error": {"message": "no such model"}}'),
        (Answer([b"x" * 1000], 500), "status 500: " + "x" * 300 + " …"),
        (events({"choices": []}, "[DONE]"), "the answer has no text"),
        (events("hello"), "an event is none of OpenAI's: hello"),
        (events({"error": {"message": "broken"}}), 'error in the stream: {"message": "broken"}'),
    ],
)
def test_failures_are_noted(answer: Answer, error: str) -> None:
    record, _ = sent_to(answer)
    assert record.error == error


def test_nobody_there_and_a_broken_connection() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        record = send_one(target(f"http://127.0.0.1:{taken.getsockname()[1]}"))
    assert record.error.startswith("ClientConnectorError: ")

    def parts() -> Any:
        yield next(iter(chat_events("a").parts))
        raise ConnectionAbortedError

    broken, _ = sent_to(Answer(parts()))
    assert "Error" in broken.error or "error" in broken.error

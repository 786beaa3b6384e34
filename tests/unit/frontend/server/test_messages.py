"""`/v1/messages`: Anthropic's forms, over a fake core that follows a script."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from folovllm.common.messages.frontend_core import RejectedRequest
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, Visit, data_of, run

Script = Callable[[str], FakeCore]
PATH = "/v1/messages"
HELLO: dict[str, Any] = {"max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"name": "f", "description": "does", "input_schema": {"type": "object"}}
ANSWER = '(plan)ok[f:{"a":1}][f:{}]'


def test_a_whole_answer(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        answer = (await server.post(PATH, HELLO, **{"X-Request-Id": "r1"})).json()
        usage = answer.pop("usage")
        assert answer == {
            "type": "message",
            "id": "msg_r1",
            "role": "assistant",
            "model": "tiny",
            "content": [{"type": "text", "text": "Hello"}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
        }
        assert usage["output_tokens"] == 6
        assert usage["cache_read_input_tokens"] == 3

    run(saying("Hello").endpoint, scenario)


@pytest.mark.parametrize(
    "more, reason, sequence",
    [({"max_tokens": 2}, "max_tokens", None), ({"stop_sequences": ["ll"]}, "stop_sequence", "ll")],
)
def test_stop_reasons(saying: Script, more: dict[str, Any], reason: str, sequence: str | None) -> None:
    async def scenario(server: Served) -> None:
        answer = (await server.post(PATH, HELLO | more)).json()
        assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
        events = [json.loads(data) for data in data_of((await server.post(PATH, HELLO | more | {"stream": True})).text)]
        assert events[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}

    run(saying("Hello").endpoint, scenario)


def test_thoughts_and_tools_whole(saying: Script, formats: dict[str, str]) -> None:
    async def scenario(server: Served) -> None:
        answer = (await server.post(PATH, HELLO | {"tools": [TOOL]})).json()
        thinking, text, *uses = answer["content"]
        assert (thinking["type"], thinking["thinking"]) == ("thinking", "plan")
        assert text == {"type": "text", "text": "ok"}
        assert [(use["type"], use["name"], use["input"]) for use in uses] == [
            ("tool_use", "f", {"a": 1}),
            ("tool_use", "f", {}),
        ]
        assert answer["stop_reason"] == "tool_use"

    run(saying(ANSWER).endpoint, scenario, **formats)


def test_the_events_of_a_stream(saying: Script, formats: dict[str, str]) -> None:
    async def scenario(server: Served) -> None:
        text = (await server.post(PATH, HELLO | {"tools": [TOOL], "stream": True})).text
        events = [json.loads(data) for data in data_of(text)]
        assert [line.removeprefix("event: ") for line in text.split("\n") if line.startswith("event: ")] == [
            event["type"] for event in events
        ]
        assert events[0]["type"] == "message_start"
        assert events[0]["message"]["content"] == []
        assert events[0]["message"]["usage"]["input_tokens"] > 0
        assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
        assert events[-2]["delta"]["stop_reason"] == "tool_use"
        assert events[-2]["usage"]["output_tokens"] == len(ANSWER) + 1
        starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
        assert [block["type"] for block in starts] == ["thinking", "text", "tool_use", "tool_use"]
        assert starts[2]["input"] == {}
        assert starts[2]["id"] != starts[3]["id"]
        stops = [event["index"] for event in events if event["type"] == "content_block_stop"]
        assert stops == [0, 1, 2, 3]
        parts = ["", "", "", ""]
        for event in events:
            if event["type"] == "content_block_delta":
                delta = event["delta"]
                kinds = {"thinking_delta": "thinking", "text_delta": "text", "input_json_delta": "partial_json"}
                parts[event["index"]] += delta[kinds[delta["type"]]]
        assert parts == ["plan", "ok", '{"a":1}', "{}"]

    run(saying(ANSWER).endpoint, scenario, **formats)


def test_an_empty_answer_has_a_block(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        text = (await server.post(PATH, HELLO | {"stream": True})).text
        kinds = [json.loads(data)["type"] for data in data_of(text)]
        assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]

    run(saying("").endpoint, scenario)


def test_a_conversation_with_tools_is_the_same_as_openais(saying: Script, formats: dict[str, str]) -> None:
    core = saying("x")
    system = [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "brief"}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "c"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"q": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "42"}]},
                {"type": "text", "text": "go on"},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "43", "is_error": True}]},
    ]
    call = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"q": 1}'}}
    same = [
        {"role": "system", "content": "Be\nbrief"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "t1", "content": "42"},
        {"role": "user", "content": "go on"},
        {"role": "tool", "tool_call_id": "t1", "content": "43"},
    ]
    tool = {"type": "function", "function": {"name": "f", "description": "does", "parameters": {"type": "object"}}}

    async def scenario(server: Served) -> None:
        body = {"max_tokens": 5, "system": system, "messages": messages, "tools": [TOOL]}
        assert (await server.post(PATH, body)).status_code == 200
        chat = {"max_tokens": 5, "messages": same, "tools": [tool]}
        assert (await server.post("/v1/chat/completions", chat)).status_code == 200
        first, second = core.requests
        assert first.prompt_token_ids == second.prompt_token_ids
        del body["max_tokens"]
        counted = (await server.post(PATH + "/count_tokens", body)).json()
        assert counted == {"input_tokens": len(first.prompt_token_ids) // 4}

    run(core.endpoint, scenario, **formats)


def test_which_tools(saying: Script, formats: dict[str, str]) -> None:
    core = saying("x")

    async def scenario(server: Served) -> None:
        for choice in (
            {"type": "auto"},
            {"type": "none"},
            {"type": "any"},
            {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        ):
            body = HELLO | {"tools": [TOOL], "tool_choice": choice}
            assert (await server.post(PATH, body)).status_code == 200
        assert [r.grammar.text if r.grammar else None for r in core.requests] == [None, None, "1True", "1False"]

    run(core.endpoint, scenario, **formats)


def test_the_last_message_of_the_assistant_is_continued(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        messages = [*HELLO["messages"], {"role": "assistant", "content": "So: "}]
        answer = (await server.post(PATH, {"max_tokens": 3, "messages": messages})).json()
        assert answer["content"][0]["text"] == " :o"  # the core answers backwards

    run(core.endpoint, scenario)


def test_thinking_is_the_templates_switch(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        for kind, ends in (("disabled", "kciuq"), ("enabled", "\ntnat"), ("adaptive", "\ntnat")):
            body = HELLO | {"max_tokens": 5, "thinking": {"type": kind}}
            assert (await server.post(PATH, body)).json()["content"][0]["text"] == ends

    run(core.endpoint, scenario)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": HELLO["messages"]},
        {"max_tokens": 5, "messages": []},
        HELLO | {"foo": 1},
        HELLO | {"messages": [{"role": "system", "content": "x"}]},
        HELLO | {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        HELLO | {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        HELLO | {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]},
        HELLO | {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [1]}]}]},
        HELLO | {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": 7}]}]},
        HELLO | {"system": [{"type": "image"}]},
        HELLO | {"tools": [TOOL | {"type": "web_search_20250305"}]},
        HELLO | {"tools": [TOOL], "tool_choice": {"type": "tool"}},
        HELLO | {"tools": [TOOL]},
        HELLO | {"temperature": -1},
        HELLO | {"stop_sequences": [""]},
        HELLO | {"max_tokens": 5, "thinking": {"type": "enabled", "display": "omitted"}},
    ],
)
def test_what_is_wrong_is_refused_in_anthropics_form(core: FakeCore, body: dict[str, Any]) -> None:
    async def scenario(server: Served) -> None:
        for more in ({}, {"stream": True}):
            answer = await server.post(PATH, body | more)
            assert answer.status_code == 400, answer.text
            assert answer.json()["type"] == "error"
            assert answer.json()["error"]["type"] == "invalid_request_error"
        assert core.requests == []

    run(core.endpoint, scenario)


def test_a_key_and_a_full_queue(core: FakeCore) -> None:
    core.reject = lambda request: RejectedRequest(request.number, "queue_full", "the queue is full", retry_after_s=1.0)

    async def scenario(server: Served) -> None:
        assert (await server.post(PATH, HELLO)).json()["error"]["type"] == "authentication_error"
        full = await server.post(PATH, HELLO, **{"X-Api-Key": "k"})
        assert (full.status_code, full.json()["error"]["type"]) == (503, "overloaded_error")
        assert full.headers["Retry-After"] == "1"

    run(core.endpoint, scenario, api_keys=("k",))


def test_L25_a_failure_behind_the_first_token_is_an_event(endless: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        visit = Visit(server.app, PATH, HELLO | {"max_tokens": 100_000, "stream": True})
        await visit.sent(2)
        endless.fail_with = lambda _: "the step failed"
        await visit.task
        assert 'event: error\ndata: {"type":"error","error":{"type":"api_error"' in visit.text
        assert "message_stop" not in visit.text

    run(endless.endpoint, scenario)


def test_an_aborted_answer_is_an_error(endless: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        task = asyncio.ensure_future(server.post(PATH, HELLO | {"max_tokens": 100_000}))
        assert await asyncio.to_thread(endless.wait_until, lambda: bool(endless.live))
        await server.context.abort_all()
        assert (await task).json()["error"]["type"] == "overloaded_error"

    run(endless.endpoint, scenario)


def test_a_lenient_server_notes_unknown_fields_of_blocks(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        block = {"type": "text", "text": "x", "y": 1, "z": None}
        body = HELLO | {"messages": [{"role": "user", "content": [block]}], "max_tokens": 2, "new": 5}
        for path in (PATH, PATH + "/count_tokens"):
            given = body if path == PATH else {name: body[name] for name in ("messages", "new")}
            answer = await server.post(path, given)
            assert answer.status_code == 200
            assert answer.headers["X-Ignored-Fields"] == "new, messages[0].content[0].y"

    run(core.endpoint, scenario, lenient=True)

"""`/v1/chat/completions` over a fake core that follows a script."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from folovllm.common.messages.frontend_core import RejectedRequest
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, Visit, data_of, run

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

Script = Callable[[str], FakeCore]


def test_a_whole_answer(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        answer = (await server.post(PATH, {"messages": HELLO}, **{"X-Request-Id": "r1"})).json()
        assert (answer["id"], answer["object"], answer["model"]) == ("chatcmpl-r1", "chat.completion", "tiny")
        assert answer["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
                "stop_reason": None,
            }
        ]
        assert answer["usage"]["completion_tokens"] == 6

    run(saying("Hello").endpoint, scenario)


@pytest.mark.parametrize(
    "options, has_usage",
    [({}, False), ({"stream_options": {}}, False), ({"stream_options": None}, False)]
    + [({"stream_options": {"include_usage": value}}, value is True) for value in (True, None, False)],
)
def test_L24_the_grammar_of_chunks(saying: Script, options: dict[str, Any], has_usage: bool) -> None:
    async def scenario(server: Served) -> None:
        events = await server.events(PATH, {"messages": HELLO, "n": 2, **options})
        if has_usage:
            usage = events.pop()
            assert usage["choices"] == []
            assert usage["usage"]["completion_tokens"] == 12
            assert usage["usage"]["total_tokens"] == 12 + usage["usage"]["prompt_tokens"]
        assert not [event for event in events if "usage" in event]
        assert {event["id"] for event in events} == {events[0]["id"]}
        for index in range(2):
            choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
            assert choices[0]["delta"] == {"role": "assistant", "content": ""}
            assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
            assert "".join(choice["delta"].get("content", "") for choice in choices) == "Hello"
            assert not [choice for choice in choices[1:-1] if not choice["delta"].get("content")]
            assert not [choice for choice in choices[1:] if "role" in choice["delta"]]

    run(saying("Hello").endpoint, scenario)


def test_usage_in_each_chunk(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        options = {"stream_options": {"continuous_usage_stats": True}}
        events = await server.events(PATH, {"messages": HELLO, **options})
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts)
        assert counts[-1] == 6

    run(saying("Hello").endpoint, scenario)


def test_reasoning_and_calls_whole(saying: Script, formats: dict[str, str]) -> None:
    async def scenario(server: Served) -> None:
        answer = (await server.post(PATH, {"messages": HELLO, "tools": [TOOL]})).json()
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "ok"
        assert choice["message"]["reasoning_content"] == "plan"
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "f", "arguments": '{"a":1}'}
        assert call["type"] == "function"
        assert call["id"].startswith("call_")
        assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}

    run(saying('(plan)ok[f:{"a":1}]').endpoint, scenario, **formats)


def test_reasoning_and_calls_streamed(saying: Script, formats: dict[str, str]) -> None:
    async def scenario(server: Served) -> None:
        body = {"messages": HELLO, "tools": [TOOL], "stream_options": {"include_usage": True}}
        events = await server.events(PATH, body)
        assert events[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
        choices = [choice for event in events[:-1] for choice in event["choices"]]
        deltas = [choice["delta"] for choice in choices]
        assert choices[-1]["finish_reason"] == "tool_calls"
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "plan"
        assert "".join(delta.get("content", "") for delta in deltas) == "ok"
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        assert calls[0]["function"]["name"] == "f"
        assert calls[0]["type"] == "function"
        assert [("id" in call, "name" in call["function"]) for call in calls[1:]] == [(False, False)] * len(calls[1:])
        assert "".join(call["function"].get("arguments", "") for call in calls) == '{"a":1}'
        assert all(delta for delta in deltas[:-1])

    run(saying('(plan)ok[f:{"a":1}]').endpoint, scenario, **formats)


@pytest.mark.parametrize(
    "text, limit, reason", [("[f:{1", None, "stop"), ("[f:{1}]", 5, "length"), ("ab", 1, "length")]
)
def test_L29_only_whole_calls_are_calls(
    saying: Script, formats: dict[str, str], text: str, limit: int | None, reason: str
) -> None:
    async def scenario(server: Served) -> None:
        body = {"messages": HELLO, "tools": [TOOL], "max_tokens": limit}
        choice = (await server.post(PATH, body)).json()["choices"][0]
        assert choice["finish_reason"] == reason
        assert "tool_calls" not in choice["message"]
        events = await server.events(PATH, body)
        assert events[-1]["choices"][0]["finish_reason"] == reason

    run(saying(text).endpoint, scenario, **formats)


def test_what_a_request_asks_of_tools(saying: Script, formats: dict[str, str]) -> None:
    core = saying("[f:1][f:2]")

    async def scenario(server: Served) -> None:
        async def message(**more: Any) -> Any:
            return (await server.post(PATH, {"messages": HELLO, "tools": [TOOL], **more})).json()["choices"][0][
                "message"
            ]

        assert len((await message())["tool_calls"]) == 2
        assert len((await message(parallel_tool_calls=False))["tool_calls"]) == 1
        assert (await message(tool_choice="none"))["content"] == "[f:1][f:2]"
        await message(tool_choice="required")
        await message(tool_choice={"type": "function", "function": {"name": "f"}}, parallel_tool_calls=False)
        grammars = [request.grammar.text if request.grammar else None for request in core.requests]
        assert grammars == [None, None, None, "1True", "1False"]

    run(core.endpoint, scenario, **formats)


def test_reasoning_can_be_left_out(saying: Script, formats: dict[str, str]) -> None:
    async def scenario(server: Served) -> None:
        body = {"messages": HELLO, "include_reasoning": False}
        message = (await server.post(PATH, body)).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "ok", "refusal": None}
        assert not [event for event in await server.events(PATH, body) if "reasoning_content" in str(event)]

    run(saying("(plan)ok").endpoint, scenario, **formats)


@pytest.mark.parametrize(
    "more, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "audio": {"id": "1"}}]}, "messages[0].audio"),
        ({"tools": [TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"nope": 1}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.s"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"type": "object"}}},
            "response_format.json_schema",
        ),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"n": 0}, "n"),
    ],
)
def test_what_is_wrong_is_refused_by_name(core: FakeCore, more: dict[str, Any], param: str) -> None:
    async def scenario(server: Served) -> None:
        answer = await server.post(PATH, {"messages": HELLO, **more})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"].startswith(param), answer.text
        assert core.requests == []

    run(core.endpoint, scenario)


def test_L32_L31_content_in_parts_or_null(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": "yo"}]
        messages = [{"role": "system", "content": parts}, {"role": "assistant", "content": None}, *HELLO]
        assert (await server.post("/tokenize", {"messages": messages})).status_code == 200
        assert (await server.post(PATH, {"messages": messages, "max_tokens": 1})).status_code == 200

    run(core.endpoint, scenario)


@pytest.mark.parametrize(
    "arguments, status",
    [
        ('{"city": "X"}', 200),
        ({"city": "X"}, 200),
        ("", 200),
        ("[]", 400),
        ("42", 400),
        ('{"city":"Bei', 400),
        ([], 400),
    ],
)
def test_L31_a_history_with_bad_arguments_is_refused_by_its_place(saying: Script, arguments: Any, status: int) -> None:
    async def scenario(server: Served) -> None:
        call = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        history = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
        history.append({"role": "tool", "tool_call_id": "t1", "content": "7"})
        answer = await server.post(PATH, {"messages": history, "max_tokens": 2})
        assert answer.status_code == status, answer.text
        if status == 400:
            assert answer.json()["error"]["param"].startswith("messages[1]")

    run(saying("x").endpoint, scenario)


@pytest.mark.parametrize("content", ["OK! ", "OK!\n"])
def test_L33_the_last_message_is_continued(core: FakeCore, content: str) -> None:
    async def scenario(server: Served) -> None:
        messages = [*HELLO, {"role": "assistant", "content": content}]
        body = {"messages": messages, "continue_final_message": True, "max_tokens": 1}
        answer = (await server.post(PATH, body)).json()
        assert answer["choices"][0]["message"]["content"] == content[-1]  # the core answers backwards

    run(core.endpoint, scenario)


def test_L15_log_probabilities(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        for more, num_top in (({}, 0), ({"top_logprobs": None}, 0), ({"top_logprobs": 0}, 0), ({"top_logprobs": 2}, 2)):
            body = {"messages": HELLO, "logprobs": True, **more}
            content = (await server.post(PATH, body)).json()["choices"][0]["logprobs"]["content"]
            assert [entry["token"] for entry in content] == ["H", "i", "<|im_end|>"]
            assert content[0]["bytes"] == [72]
            assert content[0]["logprob"] == pytest.approx(-0.072)
            assert [len(entry["top_logprobs"]) for entry in content] == [num_top] * 3
            events = await server.events(PATH, body)
            streamed = [
                entry
                for event in events
                for choice in event["choices"]
                if choice["logprobs"]
                for entry in choice["logprobs"]["content"]
            ]
            assert streamed == content
        plain = (await server.post(PATH, {"messages": HELLO, "logprobs": False})).json()
        assert plain["choices"][0]["logprobs"] is None

    run(saying("Hi").endpoint, scenario)


def test_prompt_log_probabilities(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        answer = (await server.post(PATH, {"messages": HELLO, "prompt_logprobs": 0})).json()
        assert answer["prompt_logprobs"][0] is None
        assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
        (entry,) = answer["prompt_logprobs"][1].values()
        assert set(entry) == {"logprob", "rank", "decoded_token"}

    run(saying("Hi").endpoint, scenario)


def test_L04_what_may_become_a_stop_string_is_held_back(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        for stop, text, reason in (("DEFGHIJ", "", "stop"), ("FGX", "DEFGHIJ", "stop"), ("EF", "D", "stop")):
            events = await server.events(PATH, {"messages": HELLO, "stop": [stop]})
            choices = [choice for event in events for choice in event["choices"]]
            contents = [choice["delta"].get("content", "") for choice in choices[1:]]
            assert "".join(contents) == text
            assert all(contents[:-1]), "no chunk without content but the last one"
            assert choices[-1]["finish_reason"] == reason

    run(saying("DEFGHIJ").endpoint, scenario)


def test_L25_a_failure_before_the_first_token_is_an_http_error(core: FakeCore) -> None:
    core.fail_with = lambda _: "the step failed"

    async def scenario(server: Served) -> None:
        for stream in (True, False):
            answer = await server.post(PATH, {"messages": HELLO, "stream": stream})
            assert answer.status_code == 500
            assert "the step failed" in answer.json()["error"]["message"]
            assert answer.headers["content-type"] == "application/json"
        assert (
            'folovllm:request_rejected_total{model_name="tiny",status="500"} 2.0'
            in (await server.http.get("/metrics")).text
        )

    run(core.endpoint, scenario)


def test_L25_a_failure_behind_the_first_token_is_an_event(endless: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        visit = Visit(server.app, PATH, {"messages": HELLO, "stream": True, "ignore_eos": True})
        await visit.sent(2)
        endless.fail_with = lambda _: "the third step failed"
        await visit.task
        events = data_of(visit.text)
        assert visit.status == 200
        assert '"error":{"message":' in events[-1]
        assert "the third step failed" in events[-1]
        assert '"finish_reason":"stop"' not in visit.text

    run(endless.endpoint, scenario)


def test_a_full_queue(core: FakeCore) -> None:
    core.reject = lambda request: RejectedRequest(request.number, "queue_full", "the queue is full", retry_after_s=2.3)

    async def scenario(server: Served) -> None:
        for stream in (True, False):
            answer = await server.post(PATH, {"messages": HELLO, "stream": stream})
            assert answer.status_code == 503
            assert answer.headers["Retry-After"] == "3"
            assert answer.json()["error"]["code"] == "queue_full"

    run(core.endpoint, scenario)


def test_a_server_that_drains(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        server.context.draining = True
        answer = await server.post(PATH, {"messages": HELLO})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert (await server.http.get("/ready")).status_code == 503
        assert (await server.http.get("/health")).status_code == 200

    run(core.endpoint, scenario)


def test_L22_a_client_that_goes_away_ends_its_request(endless: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        endless.gate.clear()
        queued = [Visit(server.app, PATH, {"messages": HELLO, "stream": stream, "n": 2}) for stream in (True, False)]
        assert await asyncio.to_thread(endless.wait_until, lambda: len(endless.live) == 4)
        for visit in queued:
            visit.hang_up()
        assert await asyncio.to_thread(endless.wait_until, lambda: not endless.live)
        endless.gate.set()
        running = Visit(server.app, PATH, {"messages": HELLO, "stream": True, "ignore_eos": True})
        await running.sent(2)
        running.hang_up()
        assert await asyncio.to_thread(endless.wait_until, lambda: not endless.live)
        await asyncio.gather(*[visit.task for visit in (*queued, running)], return_exceptions=True)
        assert server.context.num_active == 0
        assert not server.llm._open.outputs.live

    run(endless.endpoint, scenario)


def test_chunks_merge_while_a_client_does_not_read(endless: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        visit = Visit(server.app, PATH, {"messages": HELLO, "stream": True, "max_tokens": 500})
        await visit.sent(2)
        visit.reads.clear()
        assert await asyncio.to_thread(endless.wait_until, lambda: not endless.live)
        visit.reads.set()
        await visit.task
        assert visit.text.count("A") == 500
        assert len(visit.messages) < 100

    run(endless.endpoint, scenario)


def test_a_stream_in_portions(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        events = await server.events(PATH, {"messages": HELLO})
        contents = [event["choices"][0]["delta"].get("content", "") for event in events][1:]
        assert "".join(contents) == "a" * 30
        assert all(len(content) >= 8 for content in contents[1:-1])

    run(saying("a" * 30).endpoint, scenario, stream_interval=8)


def test_L23_one_id_twice(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        body = {"messages": HELLO, "max_tokens": 20, "ignore_eos": True}
        answers = await asyncio.gather(*[server.post(PATH, body, **{"X-Request-Id": "same"}) for _ in range(2)])
        assert [answer.json()["id"] for answer in answers] == ["chatcmpl-same"] * 2
        assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [20, 20]

    run(core.endpoint, scenario)


def test_all_requests_can_be_ended(endless: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        visit = Visit(server.app, PATH, {"messages": HELLO, "stream": True})
        other = asyncio.ensure_future(server.post(PATH, {"messages": HELLO}, **{"X-Request-Id": "b"}))
        await visit.sent(2)
        assert await asyncio.to_thread(endless.wait_until, lambda: len(endless.live) == 2)
        await server.context.abort_all()
        await visit.task
        assert '"finish_reason":"abort"' in visit.text
        assert (await other).json()["choices"][0]["finish_reason"] == "abort"

    run(endless.endpoint, scenario)

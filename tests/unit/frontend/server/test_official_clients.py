"""The official Python clients, unchanged, against the application in this process."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import anthropic
import httpx2
import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessageParam

from folovllm.common.messages.frontend_core import RejectedRequest
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import BASE_URL, TIMEOUT_S, Served, run

Script = Callable[[str], FakeCore]
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CLAUDE_TOOL: Any = {"name": "f", "input_schema": {"type": "object"}}
CLAUDE_HELLO: Any = [{"role": "user", "content": "hi"}]
ANSWER = '(plan)ok[f:{"a":1}]'


class Person(pydantic.BaseModel):
    name: str


def with_openai(
    core: FakeCore, scenario: Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, None]], **options: Any
) -> None:
    async def serve(server: Served) -> None:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=server.app, raise_app_exceptions=False))
        async with openai.AsyncOpenAI(
            api_key="k", base_url=f"{BASE_URL}/v1", http_client=http, max_retries=0, timeout=TIMEOUT_S
        ) as client:
            await scenario(client)

    run(core.endpoint, serve, **options)


def with_anthropic(
    core: FakeCore, scenario: Callable[[anthropic.AsyncAnthropic], Coroutine[Any, Any, None]], **options: Any
) -> None:
    async def serve(server: Served) -> None:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=server.app, raise_app_exceptions=False))
        async with anthropic.AsyncAnthropic(
            api_key="k", base_url=BASE_URL, http_client=http, max_retries=0, timeout=TIMEOUT_S
        ) as client:
            await scenario(client)

    run(core.endpoint, serve, **options)


def test_models_chat_and_stream(saying: Script) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        answer = await client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=2)
        assert answer.choices[0].message.content == "Hello"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].logprobs is not None
        assert answer.choices[0].logprobs.content is not None
        assert [entry.token for entry in answer.choices[0].logprobs.content][:5] == list("Hello")
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 6
        stream = await client.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, n=2, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage is not None
        texts = ["", ""]
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == ["Hello", "Hello"]

    with_openai(saying("Hello"), scenario, api_keys=("k",))


def test_completions_and_vllms_extras(core: FakeCore) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        answer = await client.completions.create(
            model="tiny", prompt=["abc", "xy"], max_tokens=3, echo=True, extra_body={"top_k": 5, "ignore_eos": True}
        )
        assert [choice.text for choice in answer.choices] == ["abccba", "xyyxy"]
        stream = await client.completions.create(model="tiny", prompt="abc", max_tokens=3, stream=True, logprobs=1)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "cba"

    with_openai(core, scenario)


def test_a_round_trip_through_a_tool(saying: Script, formats: dict[str, str]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(model="tiny", messages=HELLO, tools=[TOOL])
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls"
        assert message.tool_calls is not None
        call = message.tool_calls[0]
        assert call.type == "function"
        assert json.loads(call.function.arguments) == {"a": 1}
        history: Any = [*HELLO, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "7"}]
        again = await client.chat.completions.create(model="tiny", messages=history, tools=[TOOL])
        assert again.choices[0].message.content == "ok"
        async with client.chat.completions.stream(model="tiny", messages=HELLO, tools=[TOOL]) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.tool_calls is not None
        assert final.choices[0].message.tool_calls[0].function.arguments == '{"a":1}'

    with_openai(saying(ANSWER), scenario, **formats)


def test_structured_outputs_are_parsed(saying: Script) -> None:
    core = saying('{"name": "Ada"}')

    async def scenario(client: openai.AsyncOpenAI) -> None:
        chat = await client.beta.chat.completions.parse(model="tiny", messages=HELLO, response_format=Person)
        assert chat.choices[0].message.parsed == Person(name="Ada")
        response = await client.responses.parse(model="tiny", input="hi", text_format=Person)
        assert response.output_parsed == Person(name="Ada")
        assert [request.grammar.kind for request in core.requests if request.grammar] == ["json", "json"]

    with_openai(core, scenario)


def test_log_probabilities_of_responses(saying: Script) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        answer = await client.responses.create(
            model="tiny", input="hi", include=["message.output_text.logprobs"], top_logprobs=1
        )
        (message,) = answer.output
        assert message.type == "message"
        (text,) = message.content
        assert text.type == "output_text"
        assert [(entry.token, entry.bytes, len(entry.top_logprobs)) for entry in text.logprobs or []] == [
            ("o", [111], 1),
            ("k", [107], 1),
        ]

    with_openai(saying("ok"), scenario)


def test_responses_whole_and_streamed(saying: Script, formats: dict[str, str]) -> None:
    tool: Any = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}

    async def scenario(client: openai.AsyncOpenAI) -> None:
        answer = await client.responses.create(model="tiny", input="hi", tools=[tool])
        assert answer.output_text == "ok"
        assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
        history: Any = [{"role": "user", "content": "hi"}, *[item.model_dump() for item in answer.output]]
        call = answer.output[2]
        assert call.type == "function_call"
        history.append({"type": "function_call_output", "call_id": call.call_id, "output": "7"})
        again = await client.responses.create(model="tiny", input=history, tools=[tool])
        assert again.status == "completed"
        async with client.responses.stream(model="tiny", input="hi", tools=[tool]) as stream:
            deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            final = await stream.get_final_response()
        assert "".join(deltas) == final.output_text == "ok"

    with_openai(saying(ANSWER), scenario, **formats)


def test_errors_have_their_types(core: FakeCore) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="gpt-9", messages=HELLO)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()
        core.reject = lambda request: RejectedRequest(request.number, "queue_full", "full", retry_after_s=1.0)
        with pytest.raises(openai.InternalServerError) as full:
            await client.chat.completions.create(model="tiny", messages=HELLO)
        assert full.value.status_code == 503

    with_openai(core, scenario, api_keys=("k",))


def test_an_error_within_a_stream(endless: FakeCore) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        endless.gate.clear()
        asking = client.chat.completions.create(model="tiny", messages=HELLO, stream=True, max_tokens=100)
        task = asyncio.ensure_future(asking)
        assert await asyncio.to_thread(endless.wait_until, lambda: bool(endless.live))
        endless.fail_with = lambda _: "the step failed"
        endless.gate.set()
        with pytest.raises(openai.APIError, match="the step failed"):
            async for _ in await task:
                pass

    with_openai(endless, scenario, keep_alive_s=0.01)


def test_anthropics_messages_whole_and_streamed(saying: Script, formats: dict[str, str]) -> None:
    async def scenario(client: anthropic.AsyncAnthropic) -> None:
        asked: Any = {"model": "tiny", "max_tokens": 60, "messages": CLAUDE_HELLO, "tools": [CLAUDE_TOOL]}
        answer = await client.messages.create(**asked)
        assert [block.type for block in answer.content] == ["thinking", "text", "tool_use"]
        assert answer.stop_reason == "tool_use"
        use = answer.content[2]
        assert use.type == "tool_use"
        assert use.input == {"a": 1}
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "7"}
        turns = [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        again = await client.messages.create(**asked | {"messages": [*CLAUDE_HELLO, *turns]})
        assert again.usage.output_tokens == len(ANSWER) + 1
        async with client.messages.stream(**asked) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert text == "ok"
        assert final.stop_reason == "tool_use"
        streamed = final.content[2]
        assert streamed.type == "tool_use"
        assert streamed.input == {"a": 1}
        counted = await client.messages.count_tokens(model="tiny", messages=CLAUDE_HELLO)
        assert counted.input_tokens > 0

    with_anthropic(saying(ANSWER), scenario, api_keys=("k",), **formats)


def test_anthropics_errors_have_their_types(core: FakeCore) -> None:
    async def scenario(client: anthropic.AsyncAnthropic) -> None:
        asked: Any = {"model": "tiny", "max_tokens": 5, "messages": CLAUDE_HELLO}
        with pytest.raises(anthropic.BadRequestError):
            await client.messages.create(**asked | {"messages": []})
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(**asked | {"model": "claude-9"})
        with pytest.raises(anthropic.AuthenticationError):
            await client.with_options(api_key="wrong").messages.create(**asked)

    with_anthropic(core, scenario, api_keys=("k",))

"""Tool calls and thoughts in the markup of real models, through the endpoint."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, run

PATH = "/v1/chat/completions"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
CALL = '<tool_call>\n{"name": "f", "arguments": {"cmd": "a{b"}}\n</tool_call>'

Script = Callable[[str], FakeCore]


async def both(server: Served, body: dict[str, Any]) -> dict[str, Any]:
    """The whole answer's choice, checked to be what a stream's chunks join to."""
    (choice,) = (await server.post(PATH, body)).json()["choices"]
    events = await server.events(PATH, body)
    deltas = [event["choices"][0]["delta"] for event in events]
    message = choice["message"]
    for name in ("content", "reasoning_content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == (message.get(name) or "")
    assert events[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    told = [call for delta in deltas for call in delta.get("tool_calls") or []]
    for index, whole in enumerate(message.get("tool_calls") or []):
        mine = [call for call in told if call["index"] == index]
        assert [call["function"]["name"] for call in mine if "name" in call["function"]] == [whole["function"]["name"]]
        assert len([call for call in mine if "id" in call]) == 1
        assert "".join(call["function"]["arguments"] for call in mine) == whole["function"]["arguments"]
    assert isinstance(choice, dict)
    return choice


def test_L30_braces_in_arguments(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        choice = await both(server, BODY)
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "f", "arguments": '{"cmd": "a{b"}'}
        assert choice["message"]["content"] is None
        assert choice["finish_reason"] == "tool_calls"

    run(saying(CALL).endpoint, scenario, tool_parser="hermes")


def test_L30_two_calls_and_one_where_only_one_is_wanted(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        assert len((await both(server, BODY))["message"]["tool_calls"]) == 2
        alone = await both(server, BODY | {"parallel_tool_calls": False})
        assert len(alone["message"]["tool_calls"]) == 1
        without = await both(server, BODY | {"tool_choice": "none"})
        assert "tool_calls" not in without["message"]
        assert without["message"]["content"] == f"{CALL}\n{CALL}"

    run(saying(f"{CALL}\n{CALL}").endpoint, scenario, tool_parser="hermes")


def test_L29_a_call_cut_by_the_limit(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        choice = await both(server, BODY | {"max_tokens": 50})
        assert choice["finish_reason"] == "length"
        assert "tool_calls" not in choice["message"]

    run(saying('<tool_call>\n{"name": "f", "arguments": {"cmd": "abcdef"}}').endpoint, scenario, tool_parser="hermes")


def test_L29_plain_text_is_no_call(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        choice = await both(server, BODY)
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "no call")
        assert "tool_calls" not in choice["message"]

    run(saying("no call").endpoint, scenario, tool_parser="hermes")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_a_call_that_is_asked_for_has_a_grammar(saying: Script, choice: Any) -> None:
    core = saying(CALL)

    async def scenario(server: Served) -> None:
        assert (await both(server, BODY | {"tool_choice": choice}))["finish_reason"] == "tool_calls"
        for request in core.requests:
            assert request.grammar is not None
            assert request.grammar.kind == "lark"
            assert request.grammar.text.startswith("start: call")

    run(core.endpoint, scenario, tool_parser="hermes")


def test_thoughts_then_a_call(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        message = (await both(server, BODY))["message"]
        assert message["reasoning_content"] == "I need f."
        assert message["content"] is None
        assert len(message["tool_calls"]) == 1

    text = f"<think>\nI need f.\n</think>\n\n{CALL}"
    run(saying(text).endpoint, scenario, tool_parser="hermes", reasoning_parser="think")


def test_llamas_calls(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        (call,) = (await both(server, BODY))["message"]["tool_calls"]
        assert call["function"]["arguments"] == '{"a": 1}'

    run(saying('{"name": "f", "parameters": {"a": 1}}').endpoint, scenario, tool_parser="llama3_json")

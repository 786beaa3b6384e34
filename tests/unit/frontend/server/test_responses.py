"""`/v1/responses` over a fake core that follows a script."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, Visit, data_of, run

Script = Callable[[str], FakeCore]
PATH = "/v1/responses"
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
MODEST: list[dict[str, Any]] = [
    {},
    {"include": []},
    {"include": None, "top_logprobs": 0},
    {"reasoning": {"summary": "auto"}},
]
LOGPROBS = "message.output_text.logprobs"
ANSWER = '(plan)ok[f:{"a":1}][f:{}]'


async def events_of(server: Served, body: dict[str, Any]) -> list[Any]:
    text = (await server.post(PATH, body | {"stream": True})).text
    events = [json.loads(data) for data in data_of(text)]
    names = [line.removeprefix("event: ") for line in text.split("\n") if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_a_whole_answer(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        body = {"input": "hi", "instructions": "be brief", "metadata": {"a": "b"}, "max_output_tokens": 50}
        answer = (await server.post(PATH, body, **{"X-Request-Id": "r1"})).json()
        assert (answer["id"], answer["object"], answer["status"]) == ("resp_r1", "response", "completed")
        (item,) = answer["output"]
        assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
        assert item["content"] == [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
        assert answer["instructions"] == "be brief"
        assert answer["metadata"] == {"a": "b"}
        assert answer["usage"]["output_tokens"] == 6
        assert answer["usage"]["total_tokens"] == 6 + answer["usage"]["input_tokens"]
        assert answer["error"] is None
        assert answer["tool_choice"] == "none"

    run(saying("Hello").endpoint, scenario)


def test_an_answer_that_is_cut_off(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        body = {"input": "hi", "max_output_tokens": 2}
        answer = (await server.post(PATH, body)).json()
        assert answer["status"] == "incomplete"
        assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
        assert answer["output"][0]["status"] == "incomplete"
        last = (await events_of(server, body))[-1]
        assert last["type"] == "response.incomplete"
        assert last["response"]["output"][0]["content"][0]["text"] == "He"

    run(saying("Hello").endpoint, scenario)


def test_thoughts_and_calls(saying: Script, formats: dict[str, str]) -> None:
    async def scenario(server: Served) -> None:
        body = {"input": "hi", "tools": [TOOL]}
        answer = (await server.post(PATH, body)).json()
        reasoning, message, *calls = answer["output"]
        assert reasoning["content"] == [{"type": "reasoning_text", "text": "plan"}]
        assert message["content"][0]["text"] == "ok"
        assert [(call["type"], call["name"], call["arguments"]) for call in calls] == [
            ("function_call", "f", '{"a":1}'),
            ("function_call", "f", "{}"),
        ]
        assert calls[0]["call_id"] != calls[1]["call_id"]
        assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] == 4
        assert answer["tools"] == [TOOL | {"description": None}]

        events = await events_of(server, body)
        final = events[-1]["response"]
        assert events[-1]["type"] == "response.completed"
        assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
        assert events[0]["response"]["output"] == []

        def without_ids(items: list[Any]) -> list[Any]:
            return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in items]

        assert without_ids(final["output"]) == without_ids(answer["output"])
        check_events(events, final)

    run(saying(ANSWER).endpoint, scenario, **formats)


def check_events(events: list[Any], final: Any) -> None:
    """Each item is added once, its deltas join to it, and it is done once, in order."""
    for index, item in enumerate(final["output"]):
        own = [event for event in events if event.get("output_index") == index]
        assert own[0]["type"] == "response.output_item.added"
        assert own[0]["item"]["status"] == "in_progress"
        assert own[-1]["type"] == "response.output_item.done"
        assert own[-1]["item"] == item
        deltas = "".join(event["delta"] for event in own if event["type"].endswith(".delta"))
        if item["type"] == "function_call":
            assert deltas == item["arguments"]
            assert own[0]["item"]["arguments"] == ""
            assert own[-2]["type"] == "response.function_call_arguments.done"
            assert own[-2]["arguments"] == item["arguments"]
        else:
            assert deltas == item["content"][0]["text"]
            assert own[0]["item"]["content"] == []
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            assert [event["type"] for event in own[1:2]] == ["response.content_part.added"]
            assert own[1]["part"]["text"] == ""
            assert [event["type"] for event in own[-3:-1]] == [f"response.{kind}.done", "response.content_part.done"]


def test_an_empty_answer_has_a_message(saying: Script) -> None:
    async def scenario(server: Served) -> None:
        assert (await server.post(PATH, {"input": "hi"})).json()["output"][0]["content"][0]["text"] == ""
        events = await events_of(server, {"input": "hi"})
        check_events(events, events[-1]["response"])
        assert len(events[-1]["response"]["output"]) == 1

    run(saying("").endpoint, scenario)


def test_a_conversation_is_the_same_as_a_chats(saying: Script, formats: dict[str, str]) -> None:
    core = saying("x")
    items: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message",
            "role": "assistant",
            "id": "m",
            "status": "completed",
            "content": [{"type": "output_text", "text": "c", "annotations": []}],
        },
        {"type": "function_call", "call_id": "t1", "name": "f", "arguments": "{}", "id": "fc", "status": "completed"},
        {"type": "function_call", "call_id": "t2", "name": "f", "arguments": '{"q": 1}'},
        {"type": "function_call_output", "call_id": "t1", "output": "42"},
        {"type": "function_call_output", "call_id": "t2", "output": [{"type": "input_text", "text": "43"}]},
        {"role": "user", "content": "go on"},
        {"type": "function_call", "call_id": "t3", "name": "f", "arguments": "{}"},
    ]

    def call(name: str, arguments: str) -> dict[str, Any]:
        return {"id": name, "type": "function", "function": {"name": "f", "arguments": arguments}}

    same = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c", "tool_calls": [call("t1", "{}"), call("t2", '{"q": 1}')]},
        {"role": "tool", "tool_call_id": "t1", "content": "42"},
        {"role": "tool", "tool_call_id": "t2", "content": "43"},
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": None, "tool_calls": [call("t3", "{}")]},
    ]

    async def scenario(server: Served) -> None:
        assert (await server.post(PATH, {"input": items, "instructions": "s"})).status_code == 200
        assert (await server.post("/v1/chat/completions", {"messages": same})).status_code == 200
        assert core.requests[0].prompt_token_ids == core.requests[1].prompt_token_ids

    run(core.endpoint, scenario, **formats)


def test_what_is_asked_of_the_answer_arrives(saying: Script, formats: dict[str, str]) -> None:
    core = saying("x")
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}

    async def scenario(server: Served) -> None:
        for more in (
            {"text": {"format": schema}},
            {"text": {"format": {"type": "json_object"}}},
            {"text": {"format": {"type": "text"}}},
            {"tools": [TOOL], "tool_choice": "required"},
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}, "parallel_tool_calls": False},
            {"temperature": 0.5, "top_k": 3, "seed": 5, "store": False, "truncation": "disabled", "include": []},
        ):
            answer = await server.post(PATH, {"input": "hi", "max_output_tokens": 3, **more})
            assert answer.status_code == 200, answer.text
        kinds = [request.grammar.kind if request.grammar else None for request in core.requests]
        assert kinds == ["json", "json_object", None, "regex", "regex", None]
        assert core.requests[-1].sampling.top_k == 3

    run(core.endpoint, scenario, **formats)


@pytest.mark.parametrize(
    "more, param",
    [
        ({"input": [{"role": "user"}]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input[0].colour"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": []}, "messages"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"previous_response_id": "x"}, "previous_response_id"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": [LOGPROBS], "top_logprobs": 21}, "top_logprobs"),
        ({"include": [LOGPROBS, "file_search_call.results"]}, "include"),
        ({"include": [LOGPROBS], "tools": [TOOL]}, "include"),
        ({"reasoning": {"generate_summary": "concise"}}, "reasoning.generate_summary"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"reasoning": {"effort": "low"}}, "reasoning_effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [TOOL]}, "tools"),
        ({"foo": 1}, "foo"),
    ],
)
def test_what_is_wrong_is_refused_by_name(core: FakeCore, more: dict[str, Any], param: str) -> None:
    async def scenario(server: Served) -> None:
        answer = await server.post(PATH, {"input": "hi", **more})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"].startswith(param), answer.text
        assert core.requests == []

    run(core.endpoint, scenario)


def test_L25_a_failure_behind_the_first_token_is_an_event(endless: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        visit = Visit(server.app, PATH, {"input": "hi", "stream": True})
        await visit.sent(2)
        endless.fail_with = lambda _: "the step failed"
        await visit.task
        last = json.loads(data_of(visit.text)[-1])
        assert (last["type"], last["code"]) == ("error", "request_failed")
        assert "response.completed" not in visit.text

    run(endless.endpoint, scenario)


def test_a_lenient_server_notes_unknown_fields_of_items(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        item = {"role": "user", "content": "x", "colour": 1, "shape": None}
        answer = await server.post(PATH, {"input": [item], "new": 5, "max_output_tokens": 2})
        assert answer.status_code == 200
        assert answer.headers["X-Ignored-Fields"] == "new, input[0].colour"

    run(core.endpoint, scenario, lenient=True)


@pytest.mark.parametrize("said, text", [("Hé!", "Hé!"), ("(a plan)Hé!", "Hé!"), ("(only thoughts)", ""), ("", "")])
def test_log_probabilities_are_those_of_the_text(saying: Script, formats: dict[str, str], said: str, text: str) -> None:
    """Thoughts have none; the two bytes of é are two tokens, of which the second one shows it."""

    async def scenario(server: Served) -> None:
        body = {"input": "hi", "include": [LOGPROBS], "top_logprobs": 2}
        answer = (await server.post(PATH, body)).json()
        assert answer["top_logprobs"] == 2
        told = [part for item in answer["output"] if item["type"] == "message" for part in item["content"]]
        expected = list(text.encode())
        entries = [entry for part in told for entry in part["logprobs"]]
        assert [entry["logprob"] for entry in entries] == pytest.approx([-byte / 1000 for byte in expected])
        assert [byte for entry in entries for byte in entry["bytes"]] == expected
        assert "".join(entry["token"] for entry in entries) == text
        assert all(len(entry["top_logprobs"]) == 2 for entry in entries)

        events = await events_of(server, body)
        final = [part for item in events[-1]["response"]["output"] for part in item["content"]]
        assert [part["logprobs"] for part in final if part["type"] == "output_text"] == [p["logprobs"] for p in told]
        deltas = [event for event in events if event["type"] == "response.output_text.delta"]
        assert [entry for event in deltas for entry in event["logprobs"]] == entries
        done = [event for event in events if event["type"] == "response.output_text.done"]
        assert [event["logprobs"] for event in done] == [p["logprobs"] for p in told]
        thoughts = [event for event in events if event["type"].startswith("response.reasoning_text")]
        assert all(event["logprobs"] == [] for event in thoughts)

    run(saying(said).endpoint, scenario, reasoning_parser=formats["reasoning_parser"])


def test_without_being_asked_for_there_are_no_log_probabilities(saying: Script) -> None:
    core = saying("x")

    async def scenario(server: Served) -> None:
        for more in MODEST:
            answer = (await server.post(PATH, {"input": "hi", **more})).json()
            assert answer["output"][0]["content"][0]["logprobs"] == []
        assert [request.sampling.logprobs for request in core.requests] == [None] * 4

    run(core.endpoint, scenario)

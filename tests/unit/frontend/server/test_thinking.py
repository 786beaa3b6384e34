"""A bound on thinking: thoughts are closed after so many tokens, and the answer goes on."""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from folovllm.common.messages.frontend_core import EngineCoreRequest
from folovllm.frontend import int32
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, run
from tests.fakes.model_folder import CHAT_TEMPLATE, IM_END, ids_of, write_model_folder

PATH = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "f"}}


class Thinker:
    """A core that thinks `thoughts`, and answers `answer` to a prompt whose thoughts are closed."""

    def __init__(self, thoughts: str, answer: str) -> None:
        self.thoughts = thoughts
        self.answer = answer

    def __call__(self, request: EngineCoreRequest, _index: int) -> Sequence[int]:
        closed = int32.unpack(request.prompt_token_ids)[-1] == ord(")")
        return [*ids_of(self.answer if closed else self.thoughts + self.answer), IM_END]


@pytest.fixture
def thinker() -> Thinker:
    return Thinker("(" + "a🦜" * 20 + ")", "the answer")


@pytest.fixture
def thinking_core(tool_folder: pathlib.Path, tmp_path: pathlib.Path, thinker: Thinker) -> Iterator[FakeCore]:
    with FakeCore(f"ipc://{tmp_path}/thinker", thinker, model=str(tool_folder), max_model_len=512) as core:
        yield core


@pytest.mark.parametrize("budget, kept", [(1, ""), (2, "a"), (5, "a"), (6, "a🦜"), (7, "a🦜a"), (21, "a🦜" * 4)])
def test_thoughts_are_closed(thinking_core: FakeCore, formats: dict[str, str], budget: int, kept: str) -> None:
    async def scenario(server: Served) -> None:
        body = HELLO | {"thinking_budget": budget}
        answer = (await server.post(PATH, body)).json()
        message = answer["choices"][0]["message"]
        assert message.get("reasoning_content", "") == kept
        assert message["content"] == "the answer"
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == budget + len(")the answer") + 1
        first, second = (int32.unpack(request.prompt_token_ids) for request in thinking_core.requests)
        assert answer["usage"]["prompt_tokens"] == len(first)
        assert second[: len(first)] == first
        assert second[len(first) :] == [*ids_of("(" + "a🦜" * 20)[:budget], ord(")")]
        deltas = [choice["delta"] for event in await server.events(PATH, body) for choice in event["choices"]]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == kept
        assert "".join(delta.get("content", "") for delta in deltas) == "the answer"
        assert server.context.num_active == 0

    run(thinking_core.endpoint, scenario, **formats)


@pytest.mark.parametrize("thoughts", ["", "(short)", "(four)"])
def test_thoughts_within_the_bound_are_left_alone(
    thinking_core: FakeCore, thinker: Thinker, formats: dict[str, str], thoughts: str
) -> None:
    thinker.thoughts = thoughts

    async def scenario(server: Served) -> None:
        for budget in (len(thoughts) or 1, len(thoughts) + 1, 500):
            message = (await server.post(PATH, HELLO | {"thinking_budget": budget})).json()["choices"][0]["message"]
            assert message.get("reasoning_content", "") == thoughts.strip("()")
            assert message["content"] == "the answer"
        assert len(thinking_core.requests) == 3

    run(thinking_core.endpoint, scenario, **formats)


@pytest.mark.parametrize("max_tokens, content", [(13, "t"), (12, ""), (11, "")])
def test_the_limit_counts_thoughts_and_tag(
    thinking_core: FakeCore, formats: dict[str, str], max_tokens: int, content: str
) -> None:
    async def scenario(server: Served) -> None:
        body = HELLO | {"thinking_budget": 11, "max_tokens": max_tokens, "min_tokens": 3}
        answer = (await server.post(PATH, body)).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert (answer["choices"][0]["message"]["content"] or "") == content
        if len(thinking_core.requests) == 2:
            assert thinking_core.requests[1].max_tokens == 1
            assert thinking_core.requests[1].sampling.min_tokens == 0

    run(thinking_core.endpoint, scenario, **formats)


def test_salt_and_name_are_kept(thinking_core: FakeCore, formats: dict[str, str]) -> None:
    async def scenario(server: Served) -> None:
        body = HELLO | {"thinking_budget": 3, "cache_salt": "s", "request_id": "mine"}
        assert (await server.post(PATH, body)).status_code == 200
        assert [request.cache_salt for request in thinking_core.requests] == ["s", "s"]
        assert [request.request_id for request in thinking_core.requests] == ["mine", "mine"]

    run(thinking_core.endpoint, scenario, **formats)


def test_the_other_apis_bound_thoughts_too(thinking_core: FakeCore, formats: dict[str, str]) -> None:
    async def scenario(server: Served) -> None:
        thinking = {"type": "enabled", "budget_tokens": 6}
        claude = (await server.post("/v1/messages", HELLO | {"max_tokens": 100, "thinking": thinking})).json()
        assert [block.get("thinking") or block["text"] for block in claude["content"]] == ["a🦜", "the answer"]
        response = (await server.post("/v1/responses", {"input": "hi", "thinking_budget": 6})).json()
        assert [item["content"][0]["text"] for item in response["output"]] == ["a🦜", "the answer"]

    run(thinking_core.endpoint, scenario, **formats)


@pytest.mark.parametrize(
    "more",
    [
        {"thinking_budget": 0},
        {"n": 2},
        {"logprobs": True},
        {"prompt_logprobs": 0},
        {"response_format": {"type": "json_object"}},
        {"tools": [TOOL], "tool_choice": "required"},
    ],
)
def test_what_does_not_go_with_it(thinking_core: FakeCore, formats: dict[str, str], more: dict[str, Any]) -> None:
    async def scenario(server: Served) -> None:
        answer = await server.post(PATH, HELLO | {"thinking_budget": 5} | more)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "thinking_budget")

    run(thinking_core.endpoint, scenario, **formats)


def test_it_needs_a_parser(thinking_core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        answer = await server.post(PATH, HELLO | {"thinking_budget": 5})
        assert answer.json()["error"]["param"] == "thinking_budget"
        assert "--reasoning-parser" in answer.json()["error"]["message"]

    run(thinking_core.endpoint, scenario)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
WRAPPED = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


@pytest.fixture
def opening_core(tmp_path: pathlib.Path) -> Iterator[FakeCore]:
    """Its model's template opens the thoughts in the prompt; it answers with JSON whatever it is asked."""
    folder = write_model_folder(tmp_path / "opens")
    template = CHAT_TEMPLATE.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n") + "{# </think> #}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": template}))
    ids = [*ids_of('{"a": 1}'), IM_END]
    with FakeCore(f"ipc://{tmp_path}/opens.socket", lambda *_: ids, model=str(folder), max_model_len=512) as core:
        yield core


def prompt_of(request: EngineCoreRequest) -> str:
    """Its text, but for special tokens."""
    return bytes(token for token in int32.unpack(request.prompt_token_ids) if token < 256).decode()


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": WRAPPED},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"regex": ".*"}},
    ],
)
def test_json_is_never_taken_for_thoughts(opening_core: FakeCore, asked: dict[str, Any]) -> None:
    async def scenario(server: Served) -> None:
        body = HELLO | asked
        for choice in (await server.post(PATH, body)).json()["choices"]:
            assert choice["message"]["content"] == '{"a": 1}'
            assert "reasoning_content" not in choice["message"]
        deltas = [choice["delta"] for event in await server.events(PATH, body) for choice in event["choices"]]
        assert "".join(delta.get("content", "") for delta in deltas) == '{"a": 1}'
        for request in opening_core.requests:
            assert prompt_of(request).endswith("assistant\n<think>\n\n</think>\n\n")

    run(opening_core.endpoint, scenario)


def test_json_of_the_responses_api_is_never_taken_for_thoughts(opening_core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        body = {"input": "hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}
        (item,) = (await server.post("/v1/responses", body)).json()["output"]
        assert (item["type"], item["content"][0]["text"]) == ("message", '{"a": 1}')

    run(opening_core.endpoint, scenario)


def test_an_answer_that_nothing_holds_goes_on_with_the_thoughts(opening_core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        message = (await server.post(PATH, HELLO)).json()["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == (None, '{"a": 1}')
        assert prompt_of(opening_core.requests[0]).endswith("assistant\n<think>\n")

    run(opening_core.endpoint, scenario)

"""What the server answers, through all processes and over a real socket: limits, schemas, log probabilities."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.fakes.model_folder import CHAT_TEMPLATE, write_model_folder
from tests.integration.conftest import Daemon, eventually
from tests.integration.serving import ServeProcess

COMP = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
MAX_MODEL_LEN = 512


@pytest.fixture(scope="module")
def http(daemon: Daemon) -> Iterator[httpx.Client]:
    server = ServeProcess(["--engine", daemon.endpoint, "--served-model-name", "tiny"])
    try:
        with server.wait_ready().client() as client:
            yield client
    finally:
        server.close()


def test_L17_echo_of_a_prompt_alone(http: httpx.Client) -> None:
    body = {"prompt": "abcd", "echo": True, "max_tokens": 0, "logprobs": 1}
    answer = http.post(COMP, json=body).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abcd", "length")
    assert answer["usage"]["completion_tokens"] == 0
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list("abcd")
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["top_logprobs"][0] is None


@pytest.mark.parametrize(
    "num_tokens, status", [(MAX_MODEL_LEN - 1, 200), (MAX_MODEL_LEN, 400), (MAX_MODEL_LEN + 1, 400)]
)
def test_L17_prompts_at_the_models_length(http: httpx.Client, num_tokens: int, status: int) -> None:
    answer = http.post(COMP, json={"prompt": "a" * num_tokens, "max_tokens": None, "ignore_eos": True})
    assert answer.status_code == status
    if status == 200:
        assert answer.json()["usage"]["completion_tokens"] == 1
        assert answer.json()["choices"][0]["finish_reason"] == "length"
    else:
        assert str(num_tokens) in answer.json()["error"]["message"]
        assert str(MAX_MODEL_LEN) in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "schema",
    [{"type": "not-a-type"}, {"type": "object", "properties": {"foo": "bar"}}, {"type": "string", "pattern": "^(a"}],
)
def test_L28_a_bad_schema_is_refused(http: httpx.Client, schema: dict[str, Any]) -> None:
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for body in ({"response_format": wrapped}, {"structured_outputs": {"json": schema}}):
        for stream in (False, True):
            answer = http.post(CHAT, json={"messages": HELLO, "max_tokens": 5, "stream": stream, **body})
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["message"]
    assert http.get("/health").status_code == 200


def test_structured_outputs_keep_to_what_was_asked(http: httpx.Client) -> None:
    body = {"messages": HELLO, "structured_outputs": {"choice": ["yes", "no"]}, "n": 3, "temperature": 2.0}
    texts = [choice["message"]["content"] for choice in http.post(CHAT, json=body).json()["choices"]]
    assert set(texts) <= {"yes", "no"}
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = http.post(CHAT, json={"messages": HELLO, "response_format": wrapped, "max_tokens": 100}).json()
    if answer["choices"][0]["finish_reason"] == "stop":  # a model of random weights may write blanks up to the limit
        assert json.loads(answer["choices"][0]["message"]["content"])["a"] in (1, 2)


def test_L15_streamed_log_probabilities_are_those_of_the_whole(http: httpx.Client) -> None:
    body = {
        "messages": HELLO,
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "ignore_eos": True,
    }
    whole = http.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in whole] == [2] * 8
    with http.stream("POST", CHAT, json=body | {"stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    streamed = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in whole]


def test_a_time_limit_ends_an_answer(http: httpx.Client) -> None:
    body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "timeout_s": 0.001}
    answer = http.post(COMP, json=body).json()
    assert answer["choices"][0]["finish_reason"] == "timeout"
    assert answer["usage"]["completion_tokens"] < 500


def test_a_second_turn_is_cached(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "a long first message " * 8}]
    counts = [
        http.post(CHAT, json={"messages": messages, "max_tokens": 2}).json()["usage"]["prompt_tokens_details"]
        for _ in range(2)
    ]
    assert counts[1]["cached_tokens"] >= 128
    salted = http.post(CHAT, json={"messages": messages, "max_tokens": 2, "cache_salt": "other"}).json()
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_the_official_client_over_a_socket(http: httpx.Client) -> None:
    with openai.OpenAI(base_url=str(http.base_url.join("/v1")), api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=20, stream=True
        )
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] in {"stop", "length"}
        broken_off = client.completions.create(model="tiny", prompt="a", max_tokens=400, stream=True)
        next(iter(broken_off))
        broken_off.close()
        assert client.models.list().data[0].id == "tiny"


def tool(name: str) -> dict[str, Any]:
    """A function whose every call is a short text."""
    parameters = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    return {
        "type": "function",
        "function": {"name": name, "parameters": parameters | {"additionalProperties": False}},
    }


@pytest.fixture(scope="module")
def tool_url(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the same engine, whose chat template knows tools and opens the thoughts."""
    folder = write_model_folder(tmp_path_factory.mktemp("tools") / "tiny")
    template = CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>\n{% endif").replace(
        "{{ message.content }}", "{{ message.content }}{% for call in message.tool_calls or [] %}{{ call }}{% endfor %}"
    )
    template += "{{ tools | length if tools }}{# <tool_call> </think> #}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": template}))
    server = ServeProcess(
        ["--engine", daemon.endpoint, "--served-model-name", "tiny", "--tokenizer", str(folder)],
    )
    try:
        yield server.wait_ready().url
    finally:
        server.close()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "second"}}])
def test_a_call_that_is_asked_for_comes_and_its_result_goes_back(tool_url: str, choice: Any) -> None:
    """A model of random weights calls nothing by itself: the grammar makes it."""
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    asked: dict[str, Any] = {"model": "tiny", "tools": [tool("first"), tool("second")], "max_tokens": 400}
    with openai.OpenAI(base_url=f"{tool_url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            messages=messages, tool_choice=choice, parallel_tool_calls=False, temperature=1.5, seed=3, **asked
        ).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        (call,) = answer.message.tool_calls or []
        assert isinstance(call, openai.types.chat.ChatCompletionMessageFunctionToolCall)
        assert call.function.name in ({"first", "second"} if choice == "required" else {"second"})
        assert json.loads(call.function.arguments)["a"] in (1, 2)
        streamed = client.chat.completions.create(
            messages=messages,
            tool_choice=choice,
            parallel_tool_calls=False,
            temperature=1.5,
            seed=3,
            stream=True,
            **asked,
        )
        pieces = [chunk.choices[0].delta.tool_calls or [] for chunk in streamed]
        told = "".join(piece.function.arguments or "" for some in pieces for piece in some if piece.function)
        assert told == call.function.arguments
        messages += [answer.message.model_dump(exclude_none=True)]
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "42"}]
        last = client.chat.completions.create(messages=messages, tool_choice="none", **asked | {"max_tokens": 8})
        assert last.choices[0].finish_reason in ("stop", "length")
        assert last.usage is not None
        assert last.usage.prompt_tokens > 40


def test_the_inspector_shows_the_engine_at_work(http: httpx.Client) -> None:
    body = {"prompt": "abc", "max_tokens": 490, "ignore_eos": True, "stream": True}

    def look() -> Any:
        with http.stream("POST", COMP, json=body) as response:
            next(line for line in response.iter_lines() if line.startswith("data: {"))
            return http.get("/inspector/state").json()

    def shows_all(state: Any) -> bool:
        """On a busy machine the answer has ended, its first steps are forgotten, or the one before it still ends."""
        steps = state["steps"]
        return (
            len(state["requests"]) == 1
            and any(step["num_decode_tokens"] == 1 for step in steps)
            and any(step["num_prefill_tokens"] > 0 for step in steps)
        )

    state = next(state for state in (look() for _ in range(100)) if shows_all(state))
    (request,) = state["requests"]
    assert (request["status"], request["num_prompt_tokens"], request["max_tokens"]) == ("running", 3, 490)
    assert request["num_computed_tokens"] >= 3
    assert state["stats"]["num_running"] == 1
    assert state["engine"]["block_size"] == 16
    assert len(state["blocks"]) == -(-state["stats"]["num_blocks"] // state["block_stride"]) == 256
    assert state["blocks"].count("2") >= 1
    assert eventually(lambda: http.get("/inspector/state").json()["requests"] == [])

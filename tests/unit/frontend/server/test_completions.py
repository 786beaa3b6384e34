"""`/v1/completions` over a fake core, which answers with the prompt backwards."""

import asyncio
from typing import Any

import pytest

from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, run

PATH = "/v1/completions"


def test_a_text(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        answer = (await server.post(PATH, {"model": "tiny", "prompt": "abc", "max_tokens": 4})).json()
        assert answer["object"] == "text_completion"
        assert answer["model"] == "tiny"
        assert answer["id"].startswith("cmpl-")
        assert answer["choices"] == [{"index": 0, "text": "cbac", "logprobs": None, "finish_reason": "length"}]
        assert answer["usage"] == {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 3},
        }

    run(core.endpoint, scenario)


@pytest.mark.parametrize("max_tokens", [None, "absent"])
def test_L17_sixteen_tokens_unless_told_otherwise(core: FakeCore, max_tokens: Any) -> None:
    async def scenario(server: Served) -> None:
        body = {"prompt": "abc"} | ({} if max_tokens == "absent" else {"max_tokens": max_tokens})
        assert (await server.post(PATH, body)).json()["usage"]["completion_tokens"] == 16

    run(core.endpoint, scenario)


@pytest.mark.parametrize(
    "prompt, texts",
    [
        ("abc", ["cba"]),
        ([97, 98, 99], ["cba"]),
        (["abc", "xy"], ["cba", "yxy"]),
        ([[97, 98], [99]], ["bab", "ccc"]),
        ([[97, 98], "c"], ["bab", "ccc"]),
    ],
)
def test_prompts_in_every_form(core: FakeCore, prompt: Any, texts: list[str]) -> None:
    async def scenario(server: Served) -> None:
        body = {"prompt": prompt, "max_tokens": 3}
        choices = (await server.post(PATH, body)).json()["choices"]
        assert [(choice["index"], choice["text"]) for choice in choices] == list(enumerate(texts))
        streamed = [""] * len(texts)
        for event in await server.events(PATH, body):
            for choice in event["choices"]:
                streamed[choice["index"]] += choice["text"]
        assert streamed == texts

    run(core.endpoint, scenario)


def test_n_answers_of_several_prompts_streamed(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        body = {"prompt": ["abc", "xyz"], "n": 2, "max_tokens": 3, "stream_options": {"include_usage": True}}
        events = await server.events(PATH, body)
        texts, ends = [""] * 4, [0] * 4
        for event in events[:-1]:
            assert "usage" not in event
            for choice in event["choices"]:
                assert not ends[choice["index"]], "nothing comes behind the end"
                texts[choice["index"]] += choice["text"]
                ends[choice["index"]] += choice["finish_reason"] == "length"
        assert texts == ["cba", "bac", "zyx", "yxz"]
        assert ends == [1] * 4
        assert events[-1]["choices"] == []
        assert (events[-1]["usage"]["prompt_tokens"], events[-1]["usage"]["completion_tokens"]) == (6, 12)

    run(core.endpoint, scenario)


@pytest.mark.parametrize(
    "body, param",
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt_token_ids"),
        ({"prompt": [99_999_999]}, "prompt_token_ids"),
        ({"prompt": ["a"] * 2000}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "logprobs": 2_000_000_000}, "logprobs"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
        ({"prompt": "a", "logit_bias": {"99999999": 5}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"AI": -100}}, "logit_bias"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 500_000}, "stop"),
        ({"prompt": "a", "stop": "x" * 1_000_000}, "stop"),
        ({"prompt": "a", "stream_options": {}}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_o"),
        ({"prompt": "a", "store": True}, "store"),
        ({"prompt": "a", "temperature": -0.1}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "min_p": 2}, "min_p"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 100_000}, "n"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"prompt": "a", "seed": 2**70}, "seed"),
        ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids"),
        ({"prompt": "a", "bad_words": [""]}, "bad_words"),
        ({"prompt": "a", "timeout_s": -1}, "timeout_s"),
        ({"prompt": "a" * 64}, "prompt"),
        ({"prompt": "a" * 30_000}, "prompt"),
    ],
)
def test_L12_L06_what_is_wrong_is_refused_by_name(core: FakeCore, body: dict[str, Any], param: str) -> None:
    async def scenario(server: Served) -> None:
        for more in ({}, {"stream": True}) if "stream" not in body and "stream_options" not in body else ({},):
            answer = await server.post(PATH, body | more)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["type"] == "invalid_request_error"
            assert answer.json()["error"]["param"].startswith(param)
            assert len(answer.content) < 3000
        assert core.requests == []

    run(core.endpoint, scenario)


def test_L06_null_and_a_bare_string_are_stops(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        for stop, text in ((None, "cbacba"), ("a", "cb"), (["a", "x"], "cb")):
            answer = await server.post(PATH, {"prompt": "abc", "max_tokens": 6, "stop": stop})
            assert answer.json()["choices"][0]["text"] == text

    run(core.endpoint, scenario)


def test_L12_a_refused_request_disturbs_no_stream(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        core.gate.clear()
        running = server.http.post(PATH, json={"prompt": "abc", "max_tokens": 9, "stream": True})
        task = asyncio.ensure_future(running)
        assert await asyncio.to_thread(core.wait_until, lambda: len(core.live) == 1)
        bodies: list[dict[str, Any]] = [{"prompt": [-1]}, {"prompt": "a", "logit_bias": {"AI": 1}}, {"prompt": []}]
        for bad in bodies:
            assert (await server.post(PATH, bad)).status_code == 400
        core.gate.set()
        answer = await task
        assert answer.text.count("[DONE]") == 1
        assert '"finish_reason":"length"' in answer.text

    run(core.endpoint, scenario)


def test_a_model_that_is_not_served(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        answer = await server.post(PATH, {"prompt": "a", "model": "gpt-9"})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"

    run(core.endpoint, scenario)


def test_echo(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        body = {"prompt": "abc", "max_tokens": 2, "echo": True}
        assert (await server.post(PATH, body)).json()["choices"][0]["text"] == "abccb"
        ids = (await server.post(PATH, body | {"prompt": [97, 98], "n": 2})).json()
        assert [choice["text"] for choice in ids["choices"]] == ["abba", "abab"]
        events = await server.events(PATH, body)
        assert "".join(event["choices"][0]["text"] for event in events) == "abccb"
        nothing = (await server.post(PATH, body | {"max_tokens": 0})).json()
        assert nothing["choices"][0]["text"] == "abc"
        assert nothing["choices"][0]["finish_reason"] == "length"
        assert nothing["usage"]["completion_tokens"] == 0

    run(core.endpoint, scenario)


def test_a_text_takes_no_special_tokens_if_told_so(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        for flag in (None, True, False):
            await server.post(PATH, {"prompt": "ab", "add_special_tokens": flag, "max_tokens": 1})
        assert len(core.requests) == 3

    run(core.endpoint, scenario)


def test_the_requests_name_and_priority_reach_the_core(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        answer = await server.post(PATH, {"prompt": "ab", "priority": -3}, **{"X-Request-Id": "mine"})
        assert answer.json()["id"] == "cmpl-mine"
        await server.post(PATH, {"prompt": ["a", "b"], "request_id": "given"})
        assert [request.request_id for request in core.requests] == ["mine", "given-0", "given-1"]
        assert core.requests[0].priority == -3

    run(core.endpoint, scenario)

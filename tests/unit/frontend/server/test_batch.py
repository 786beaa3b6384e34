"""Batch lines over a fake core: every line has its output line, whatever it is."""

import asyncio
import io
import json
import os
import pathlib
from typing import Any

import pytest

from folovllm.common.errors import EngineDeadError
from folovllm.common.messages.frontend_core import RejectedRequest
from folovllm.frontend.async_llm import AsyncLLM
from folovllm.frontend.server.batch import Batch, BatchCounts
from folovllm.frontend.server.batch_lines import LineReader
from folovllm.frontend.server.context import ServerContext
from folovllm.frontend.server.options import ServerOptions
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, run

CHAT, COMP = "/v1/chat/completions", "/v1/completions"
MAX_BYTES = 5000


def line(custom_id: Any, body: Any, url: str = COMP, method: str = "POST") -> str:
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


def answered(
    core: FakeCore, lines: list[str], *, max_in_work: int = 8, done: frozenset[str] = frozenset()
) -> tuple[list[dict[str, Any]], BatchCounts]:
    """Output lines by the number or name of their custom id, and the counts."""

    async def all_of() -> tuple[bytes, BatchCounts, int]:
        read, write = os.pipe()
        sink, ended = io.BytesIO(), []
        async with AsyncLLM(engine=core.endpoint) as llm:
            context = ServerContext(llm, ServerOptions(served_model_names=("tiny",)))
            batch = Batch(context, LineReader(read, MAX_BYTES), sink, done)
            with os.fdopen(write, "wb") as file:
                file.write("\n".join(lines).encode("utf-8", "surrogateescape"))
            try:
                await asyncio.wait_for(batch.run(max_in_work, lambda: ended.append(1)), 60)
            finally:
                os.close(read)
        return sink.getvalue(), batch.counts, len(ended)

    data, counts, num_ended = asyncio.run(all_of())
    assert num_ended == len([text for text in lines if text.strip()])
    outputs = [json.loads(output) for output in data.decode().splitlines()]
    assert len({output["id"] for output in outputs}) == len(outputs)
    return sorted(outputs, key=lambda output: str(output["custom_id"])), counts


def test_answers_are_those_of_the_server(core: FakeCore) -> None:
    bodies = {
        CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 5, "logprobs": True},
        COMP: {"prompt": ["abc", "xy"], "max_tokens": 3, "n": 2},
    }
    outputs, counts = answered(core, [line(url, body, url) for url, body in bodies.items()])
    assert counts == BatchCounts(answered=2)

    async def scenario(server: Served) -> None:
        for output in outputs:
            over_http = (await server.post(output["custom_id"], bodies[output["custom_id"]])).json()
            ours = output["response"]["body"]
            assert ours["id"].endswith(output["response"]["request_id"]) and ours["object"] == over_http["object"]
            for name in ("choices", "usage", "model"):
                assert ours[name] == over_http[name]

    run(core.endpoint, scenario)
    assert [output["response"]["status_code"] for output in outputs] == [200, 200]
    assert [output["error"] for output in outputs] == [None, None]
    assert [output["id"] == output["response"]["request_id"] for output in outputs] == [True, True]


@pytest.mark.parametrize(
    "body, url, status, param",
    [
        ({"prompt": "a", "temprature": 1}, COMP, 400, "temprature"),
        ({"prompt": "a", "temperature": -1}, COMP, 400, "temperature"),
        ({"prompt": ""}, COMP, 400, "prompt"),
        ({"prompt": "a" * 100}, COMP, 400, None),
        ({"prompt": "a", "stream": True}, COMP, 400, "stream"),
        ({"messages": [{"role": "user", "content": "a"}], "stream": True}, CHAT, 400, "stream"),
        ({"messages": []}, CHAT, 400, "messages"),
        ({"messages": [{"role": "user", "content": "a"}], "model": "other"}, CHAT, 404, "model"),
        ("text", COMP, 400, None),
        (None, CHAT, 400, None),
    ],
)
def test_a_request_that_is_refused(core: FakeCore, body: Any, url: str, status: int, param: str | None) -> None:
    outputs, counts = answered(core, [line("bad", body, url), line("good", {"prompt": "abc", "max_tokens": 2})])
    bad, good = outputs
    assert (bad["response"]["status_code"], bad["error"]) == (status, None)
    error = bad["response"]["body"]["error"]
    assert error["message"] and (param is None or error["param"] == param)
    assert good["response"]["body"]["choices"][0]["text"] == "cb"
    assert counts == BatchCounts(answered=1, failed=1)


@pytest.mark.parametrize(
    "text, custom_id, code, message",
    [
        ("{", None, "invalid_json_line", "line 1: "),
        ("[]", None, "invalid_json_line", "Expected `object`"),
        ("\udcff{}", None, "invalid_json_line", "line 1: "),
        ('{"custom_id": "a"}', "a", "invalid_json_line", "missing required field `method`"),
        ('{"custom_id": 5, "method": "POST", "url": "x", "body": {}}', 5, "invalid_json_line", "Expected `str`"),
        ('{"custom_id": ["a"]}', None, "invalid_json_line", "line 1: "),
        (line("a", {}, method="GET"), "a", "invalid_method", "line 1: method 'GET' is not POST"),
        (line("a", {}, url="/v1/embeddings"), "a", "invalid_url", "is not /v1/chat/completions or /v1/completions"),
        (line("a", {})[:-1] + ', "more": 1}', "a", "invalid_json_line", "unknown field `more`"),
        (line("a", "x" * MAX_BYTES), None, "invalid_json_line", "line 1: it is longer than --max-body-mb allows"),
        ("[" * 3000, None, "invalid_json_line", "line 1: "),
    ],
)
def test_a_line_that_is_no_request(core: FakeCore, text: str, custom_id: Any, code: str, message: str) -> None:
    outputs, counts = answered(core, [text, "", line("z", {"prompt": "abc"})])
    bad, good = sorted(outputs, key=lambda output: output["response"] is not None)
    assert (bad["custom_id"], bad["response"], bad["error"]["code"]) == (custom_id, None, code)
    assert message in bad["error"]["message"]
    assert good["custom_id"] == "z" and good["error"] is None
    assert counts == BatchCounts(answered=1, invalid=1)


def test_no_more_lines_in_work_than_told(core: FakeCore) -> None:
    most = 0

    def note(_: Any) -> None:
        nonlocal most
        most = max(most, len(core.live) + 1)

    core.reject = note
    outputs, counts = answered(
        core, [line(str(i), {"prompt": "ab", "max_tokens": 3}) for i in range(30)], max_in_work=4
    )
    assert len(outputs) == counts.answered == 30
    assert 1 <= most <= 4


def test_finished_ones_are_passed_over(core: FakeCore) -> None:
    lines = [line(name, {"prompt": "ab", "max_tokens": 1}) for name in ("a", "b", "c")]
    outputs, counts = answered(core, lines, done=frozenset({"a", "c"}))
    assert [output["custom_id"] for output in outputs] == ["b"]
    assert counts == BatchCounts(answered=1, skipped=2)


def test_a_request_that_fails_in_the_engine_is_a_line(core: FakeCore) -> None:
    core.fail_with = lambda request: "out of paper" if request.max_tokens == 7 else ""
    bodies = [{"prompt": "ab", "max_tokens": 7}, {"prompt": "ab", "max_tokens": 1}]
    outputs, counts = answered(core, [line(str(i), body) for i, body in enumerate(bodies)])
    assert [output["response"]["status_code"] for output in outputs] == [500, 200]
    assert "out of paper" in outputs[0]["response"]["body"]["error"]["message"]
    assert (counts.answered, counts.failed) == (1, 1)


def test_a_full_queue_is_waited_for(core: FakeCore) -> None:
    refusals = [1, 2]

    def full(request: Any) -> RejectedRequest | None:
        if not refusals:
            return None
        refusals.pop()
        return RejectedRequest(request.number, "queue_full", "the queue is full", retry_after_s=0.001)

    core.reject = full
    outputs, counts = answered(core, [line("a", {"prompt": "abc", "max_tokens": 2})])
    assert outputs[0]["response"]["status_code"] == 200 and counts == BatchCounts(answered=1)
    assert not refusals


def test_an_engine_that_ends_ends_the_run(core: FakeCore) -> None:
    core.gate.clear()

    def end(_: Any) -> None:
        core.fail("the worker is gone")

    core.reject = end
    with pytest.raises(EngineDeadError, match="the worker is gone"):
        answered(core, [line(str(i), {"prompt": "abc"}) for i in range(3)])


def test_a_fault_of_ours_is_a_line_too(
    core: FakeCore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("folovllm.frontend.server.endpoints.completions.to_sampling_params", broken)
    outputs, counts = answered(core, [line("a", {"prompt": "abc"})])
    assert outputs[0]["response"]["status_code"] == 500 and counts.failed == 1
    assert "secret" not in json.dumps(outputs) and "nobody foresaw" in caplog.text


def test_prompts_of_token_ids_and_an_empty_file(core: FakeCore, tmp_path: pathlib.Path) -> None:
    outputs, _ = answered(core, [line("a", {"prompt": [97, 98], "max_tokens": 2})])
    assert outputs[0]["response"]["body"]["choices"][0]["text"] == "ba"
    assert answered(core, []) == ([], BatchCounts())

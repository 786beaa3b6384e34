"""`folovllm chat` with an engine behind a fake core, and with servers that follow a script."""

import io
import re
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend.cli.chat import EnginePartner, ServerPartner, _timed
from folovllm.frontend.cli.conversation import Conversation
from folovllm.frontend.cli.main import run
from folovllm.frontend.llm import LLM
from folovllm.frontend.openai_client import ChatDelta, OpenAIClient
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.scripted_server import Answer, Asked, ScriptedServer, as_json, chat_events, events, models
from tests.unit.frontend.conftest import Run

Script = Callable[[Asked], Answer]


def test_chat_quick_answers_and_exits(folo: Run, core: FakeCore) -> None:
    code, out, err = folo("chat", "--quick", "hi", "--max-tokens", "6")
    assert (code, out) == (0, "\ntnats\n")  # the rendered prompt backwards
    assert "cut: --max-tokens" in err
    (request,) = core.requests
    assert request.stream


@pytest.mark.parametrize("args, temperature", [((), 0.2), (("--temperature", "0.9"), 0.9), (("--top-k", "5"), 1.0)])
def test_chat_lowers_the_temperature_only_where_nobody_chose(
    folo: Run, core: FakeCore, args: tuple[str, ...], temperature: float
) -> None:
    assert folo("chat", "--quick", "hi", "--max-tokens", "1", *args)[0] == 0
    assert core.requests[0].sampling.temperature == temperature


def test_chat_without_terminal_reads_lines_and_remembers(folo: Run, core: FakeCore) -> None:
    lines = "one\n/stats\n/clear\ntwo\n/bogus\n/help\n/exit\nnever\n"
    code, out, err = folo("chat", "--system", "S", "--max-tokens", "2", stdin=lines)
    assert code == 0
    assert "process" in err, "the start-up table"
    assert "last answer: 2 tokens" in out
    assert "(forgotten)" in out
    assert "/bogus is not known" in out
    assert len(core.requests) == 2
    sizes = [len(request.prompt_token_ids) for request in core.requests]
    assert sizes[0] == sizes[1], "the conversation was forgotten in between"


def test_chat_ask_answers_each_and_keeps_the_conversation(folo: Run, core: FakeCore) -> None:
    code, out, _ = folo("chat", "--ask", "a", "--ask", "b", "--max-tokens", "1", "--no-table", stdin="never\n")
    assert code == 0
    assert re.findall(r"^you> (.)$", out, re.MULTILINE) == ["a", "b"]
    assert len(core.requests) == 2
    assert len(core.requests[1].prompt_token_ids) > len(core.requests[0].prompt_token_ids)


def test_chat_tells_a_refused_question_and_goes_on(folo: Run, core: FakeCore) -> None:
    code, _, err = folo("chat", "--no-table", "--max-tokens", "1", stdin="x" * 70 + "\nok\n")
    assert code == 0
    assert "Error: the prompt has" in err
    assert len(core.requests) == 1


@pytest.fixture
def conversation(core: FakeCore) -> Iterator[Conversation]:
    with LLM(engine=core.endpoint) as llm:
        yield Conversation(EnginePartner(llm, SamplingParams(max_tokens=3)), None)


def test_ctrl_c_stops_the_answer_and_keeps_what_came(
    conversation: Conversation, core: FakeCore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    core.gate.clear()
    monkeypatch.setattr(LLM, "_next_delta", interrupted)
    assert not conversation.answer("hi")
    assert "[stopped]" in capsys.readouterr().out
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert core.wait_until(lambda: core.aborted == [0])


def test_a_failed_answer_is_not_remembered(conversation: Conversation, core: FakeCore) -> None:
    core.fail_with = lambda request: "broken"
    with pytest.raises(RuntimeError, match="broken"):
        conversation.answer("hi")
    assert conversation.messages == []


def answering(*answers: Answer) -> Script:
    """Lists the models one and two; then gives these answers, one for each question."""
    left = iter(answers)
    return lambda asked: models("one", "two") if asked.path == "/v1/models" else next(left)


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Chats with a server of a script; returns exit code, stdout, stderr."""

    def call(server: ScriptedServer, *args: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = run(["chat", "--url", server.url, *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_server_answers_and_is_told_what_was_said(ask: Run) -> None:
    with ScriptedServer(answering(chat_events("o", "k"), chat_events("so"))) as server:
        code, out, err = ask(server, "--system", "S", "--max-tokens", "9", "--top-k", "3", stdin="one\ntwo\n")
        first, second = (asked.body for asked in server.asked[1:])
    assert (code, out, err) == (0, "ok\nso\n", "")
    assert [message["content"] for message in first["messages"]] == ["S", "one"]
    assert [message["content"] for message in second["messages"]] == ["S", "one", "ok", "two"]
    assert {name: first[name] for name in ("model", "max_tokens", "top_k")} == {
        "model": "one",
        "max_tokens": 9,
        "top_k": 3,
    }
    assert "temperature" not in first, "the server decides"


def test_the_commands_are_the_same(ask: Run) -> None:
    with ScriptedServer(answering(chat_events("a", "b", "c"), chat_events("d"))) as server:
        code, out, _ = ask(server, "two", stdin="one\n/stats\n/clear\ntwo\n/bogus\n/help\n/exit\nnever\n")
        bodies = [asked.body for asked in server.asked[1:]]
    assert code == 0
    assert "last answer: 3 tokens, first after" in out
    assert f"server:      {server.url}, model two" in out
    assert "(forgotten)" in out and "/bogus is not known" in out
    assert [len(body["messages"]) for body in bodies] == [1, 1]


def test_quick_questions_key_and_cut(ask: Run) -> None:
    with ScriptedServer(answering(chat_events("a", reason="length"))) as server:
        code, out, err = ask(server, "--quick", "hi", "--api-key", "k")
        assert {asked.headers.get("Authorization") for asked in server.asked} == {"Bearer k"}
    assert (code, out) == (0, "a\n")
    assert "cut: --max-tokens" in err


def test_thoughts_are_shown_and_not_remembered(ask: Run) -> None:
    thinking = events(
        {"choices": [{"delta": {"reasoning_content": "hm"}}]},
        {"choices": [{"delta": {"content": "yes"}, "finish_reason": "stop"}]},
        "[DONE]",
    )
    with ScriptedServer(answering(thinking, chat_events("x"))) as server:
        _, out, _ = ask(server, stdin="one\ntwo\n")
        body = server.asked[-1].body
    assert "hm" in out and "\n\nyes" in out
    assert [message["content"] for message in body["messages"]] == ["one", "yes", "two"]


@pytest.mark.parametrize("status", [400, 503])
def test_a_refused_question_is_told_and_the_conversation_goes_on(ask: Run, status: int) -> None:
    refusal = as_json({"error": {"message": "too long"}}, status)
    with ScriptedServer(answering(refusal, chat_events("b"))) as server:
        code, out, err = ask(server, stdin="one\ntwo\n")
        assert len(server.asked[-1].body["messages"]) == 1, "a refused question is not remembered"
    assert (code, out) == (0, "b\n")
    assert f"answers {status}: too long" in err


@pytest.mark.parametrize(
    "answer, code, message",
    [
        (as_json({"error": {"message": "model 'x' is not served"}}, 404), 2, "answers 404: model 'x' is not served"),
        (as_json({"error": {"message": "no key"}}, 401), 2, "answers 401: no key; give its key with --api-key"),
        (as_json({"error": {"message": "broken"}}, 500), 1, "answers 500: broken"),
    ],
)
def test_what_ends_the_chat(ask: Run, answer: Answer, code: int, message: str) -> None:
    with ScriptedServer(answering(answer)) as server:
        got, out, err = ask(server, "x", stdin="one\ntwo\n")
    assert (got, out) == (code, "")
    assert message in err and "Traceback" not in err


def test_a_server_that_is_not_there_and_one_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert run(["chat", "--url", f"http://127.0.0.1:{taken.getsockname()[1]}", "--quick", "a"]) == 1
    assert "Connection refused" in capsys.readouterr().err
    with ScriptedServer(lambda _: Answer([b"hi"], kind="text/plain")) as server:
        assert run(["chat", "--url", server.url, "--quick", "a"]) == 2
    assert "is no OpenAI-compatible server" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, message",
    [
        (["--block-size", "8", "--dtype", "float32"], "block_size, dtype cannot be given with --url"),
        (["--engine", "ipc://x"], "engine cannot be given with --url"),
        (["--tokenizer", "x"], "tokenizer cannot be given with --url"),
        (["--temperature", "-1"], "temperature=-1.0 must be"),
    ],
)
def test_options_that_do_not_go_with_a_server(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["chat", "--url", "http://127.0.0.1:1", *args]) == 2
    assert message in capsys.readouterr().err


def test_a_key_needs_its_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "demo", "--api-key", "k"]) == 2
    assert "give its --url too" in capsys.readouterr().err


def test_ctrl_c_hangs_up_and_keeps_what_came(capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(OpenAIClient):
        def _delta(self, data: bytes) -> ChatDelta:
            delta = super()._delta(data)
            if delta.text == "b":
                raise KeyboardInterrupt
            return delta

    with ScriptedServer(answering(chat_events("a", "b", "c"))) as server:
        conversation = Conversation(ServerPartner(Interrupted(server.url), "one", {}), None)
        assert not conversation.answer("hi")
    assert capsys.readouterr().out == "a [stopped]\n"
    assert [message["content"] for message in conversation.messages] == ["hi", "a"]


def test_speed_is_that_of_the_servers_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([11.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    deltas = [ChatDelta(), ChatDelta("a"), ChatDelta("b"), ChatDelta(num_tokens=5)]
    *_, last = _timed(iter(deltas), 10.0)
    assert str(last.speed) == "5 tokens, first after 1000 ms, then 4.0 tokens/s"

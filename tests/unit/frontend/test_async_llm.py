"""`AsyncLLM` against a fake core: many at once, cancelling, ids given twice, the end of the engine."""

import asyncio
import pathlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import pytest

from folovllm.common.errors import EngineDeadError, RequestError, RequestFailedError
from folovllm.common.messages.frontend_core import EngineCoreOutputs
from folovllm.common.sampling_params import SamplingParams
from folovllm.common.transport import encode
from folovllm.frontend.async_llm import AsyncLLM, News
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.model_folder import IM_END

_TIMEOUT_S = 60.0


def tokens(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, **more)


def run(core: FakeCore, scenario: Callable[[AsyncLLM], Coroutine[Any, Any, None]]) -> None:
    """Runs a scenario with an AsyncLLM, within a bound."""

    async def bounded() -> None:
        async with AsyncLLM(engine=core.endpoint) as llm:
            await asyncio.wait_for(scenario(llm), _TIMEOUT_S)

    asyncio.run(bounded())


async def text_of(llm: AsyncLLM, prompt: Any, params: SamplingParams, **options: Any) -> str:
    return "".join([output.outputs[0].text async for output in llm.generate(prompt, params, **options)])


async def until(condition: Callable[[], bool], core: FakeCore) -> None:
    assert await asyncio.to_thread(core.wait_until, condition)


def test_deltas_join_to_the_whole(core: FakeCore) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        outputs = [output async for output in llm.generate("abc", tokens(7))]
        assert "".join(output.outputs[0].text for output in outputs) == "cbacbac"
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1].request_id == "0"

    run(core, scenario)


def test_many_at_once_over_one_connection(core: FakeCore) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        texts = await asyncio.gather(*(text_of(llm, [65 + i % 26], tokens(3)) for i in range(300)))
        assert texts == [chr(65 + i % 26) * 3 for i in range(300)]
        assert not llm._open.outputs.live
        assert not llm._states

    run(core, scenario)


def test_chat(core: FakeCore) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        messages = [{"role": "user", "content": "hi"}]
        outputs = [output async for output in llm.chat(messages, tokens(3))]
        assert outputs[0].prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert outputs[-1].finished

    run(core, scenario)


def test_n_answers(core: FakeCore) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        texts = ["", ""]
        async for output in llm.generate("abcd", tokens(3, n=2)):
            for answer in output.outputs:
                texts[answer.index] += answer.text
        assert texts == ["dcb", "cba"]

    run(core, scenario)


def test_a_stop_string_and_max_tokens_0(core: FakeCore) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        assert await text_of(llm, "abc", tokens(30, stop="ac")) == "cb"
        await until(lambda: not core.live, core)
        outputs = [output async for output in llm.generate("abc", tokens(0))]
        assert [(o.finished, o.outputs[0].finish_reason) for o in outputs] == [(True, "length")]

    run(core, scenario)


def test_L22_leaving_or_cancelling_the_consumer_aborts_in_the_core(core: FakeCore) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        core.gate.clear()
        task = asyncio.ensure_future(text_of(llm, "ab", tokens(50)))
        await until(lambda: len(core.live) == 1, core)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not core.live and core.aborted == [0], core)
        core.gate.set()
        stream = llm.generate("ab", tokens(60))
        await anext(stream)
        await stream.aclose()
        assert not llm._open.outputs.live
        assert not llm._states
        assert await text_of(llm, "ab", tokens(2)) == "ba"

    run(core, scenario)


def test_L23_one_id_twice(core: FakeCore) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        core.gate.clear()
        consumers = [asyncio.ensure_future(_collect(llm, prompt, "same")) for prompt in ("ab", "cd")]
        await until(lambda: len(core.live) == 2, core)
        assert await llm.abort("same")
        assert not await llm.abort("other")
        core.gate.set()
        (first, first_reason), (second, second_reason) = await asyncio.gather(*consumers)
        assert (first, first_reason) == ("", "abort")
        assert (second, second_reason) == ("dcdc", "length")
        assert core.aborted == [0]
        assert not await llm.abort("same")

    run(core, scenario)


async def _collect(llm: AsyncLLM, prompt: str, request_id: str) -> tuple[str, str | None]:
    text, reason = "", None
    async for output in llm.generate(prompt, tokens(4), request_id=request_id):
        assert output.request_id == request_id
        text += output.outputs[0].text
        reason = output.outputs[0].finish_reason
    return text, reason


def test_errors_belong_to_their_request(core: FakeCore) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        core.fail_with = lambda request: "broken" if request.request_id == "bad" else ""
        results = await asyncio.gather(
            text_of(llm, "ab", tokens(4)),
            text_of(llm, "ab", tokens(4), request_id="bad"),
            text_of(llm, "", tokens(4)),
            return_exceptions=True,
        )
        assert results[0] == "baba"
        assert isinstance(results[1], RequestFailedError)
        assert isinstance(results[2], RequestError)
        assert await text_of(llm, "ab", tokens(2)) == "ba"

    run(core, scenario)


def test_stats_come_while_requests_run(core: FakeCore) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        core.gate.clear()
        task = asyncio.ensure_future(text_of(llm, "ab", tokens(4)))
        await until(lambda: len(core.live) == 1, core)
        assert (await llm.get_stats()).num_running == 1
        core.gate.set()
        assert await task == "baba"

    run(core, scenario)


@pytest.mark.parametrize("how", ["tells", "hangs up"])
def test_the_end_of_the_engine_wakes_everyone(model_folder: pathlib.Path, tmp_path: pathlib.Path, how: str) -> None:
    async def scenario(llm: AsyncLLM, core: FakeCore, end: Callable[[], Awaitable[None]]) -> None:
        core.gate.clear()
        tasks = [asyncio.ensure_future(text_of(llm, "ab", tokens(4))) for _ in range(3)]
        await until(lambda: len(core.live) == 3, core)
        if how == "tells":
            core.fail("worker-0: RuntimeError: broken")
        else:
            await end()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) for result in results)
        with pytest.raises(EngineDeadError, match=r"broken|lost"):
            await llm.get_stats()
        with pytest.raises(EngineDeadError, match=r"broken|lost"):
            await text_of(llm, "ab", tokens(4))

    with FakeCore(f"ipc://{tmp_path}/core", model=str(model_folder)) as core:

        async def bounded() -> None:
            async with AsyncLLM(engine=core.endpoint) as llm:
                await asyncio.wait_for(scenario(llm, core, lambda: asyncio.to_thread(core.close)), _TIMEOUT_S)

        asyncio.run(bounded())


def test_closing_wakes_everyone(core: FakeCore) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        core.gate.clear()
        task = asyncio.ensure_future(text_of(llm, "ab", tokens(4)))
        await until(lambda: len(core.live) == 1, core)
        llm.close()
        with pytest.raises(EngineDeadError, match="was closed"):
            await task

    run(core, scenario)


def test_one_event_loop_and_known_options(core: FakeCore) -> None:
    llm = AsyncLLM(engine=core.endpoint)
    assert asyncio.run(text_of(llm, "ab", tokens(2))) == "ba"
    assert asyncio.run(text_of(llm, "ab", tokens(2))) == "ba", "the first loop is closed, so another may take over"

    async def from_another_loop() -> None:
        await text_of(llm, "ab", tokens(2))
        await asyncio.to_thread(asyncio.run, text_of(llm, "ab", tokens(2)))

    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(from_another_loop())
    assert llm.get_tokenizer().eos_token_id == IM_END
    assert llm.get_default_sampling_params().temperature == 1.0
    assert llm.startup.wall_s > 0
    llm.close()
    with pytest.raises(TypeError, match=r"AsyncLLM\(\) got an unexpected keyword argument 'blocksize'"):
        AsyncLLM("demo", blocksize=8)  # type: ignore[call-arg]


def test_log_probabilities_and_prompts(core: FakeCore) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        params = tokens(4, logprobs=1, prompt_logprobs=0)
        outputs = [output async for output in llm.generate("abc", params)]
        places = [place for output in outputs for place in output.outputs[0].logprobs or ()]
        assert [list(place) for place in places] == [[t, t + 1] for t in b"cbac"]
        assert [place and list(place) for place in outputs[0].prompt_logprobs or ()] == [None, [98], [99]]

    run(core, scenario)


def test_a_snapshot_and_statistics_do_not_mix(core: FakeCore) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        snapshot, stats = await asyncio.gather(llm.snapshot(), llm.get_stats())
        assert (snapshot.blocks, snapshot.block_stride) == (bytes([0, 1, 2, 3]), 25)
        assert snapshot.stats.num_blocks == stats.num_blocks == 100
        assert snapshot.ticket != stats.ticket

    run(core, scenario)


def test_the_prefix_cache_can_be_reset(core: FakeCore) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        assert (await llm.get_stats()).num_cached_blocks == 7
        first, second = await asyncio.gather(llm.reset_prefix_cache(), llm.get_stats())
        assert first is True
        assert second.num_cached_blocks == 0

    run(core, scenario)


def test_a_malformed_message_about_one_request_fails_that_one(core: FakeCore) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        core.gate.clear()
        tasks = [asyncio.ensure_future(text_of(llm, "ab", tokens(4))) for _ in range(2)]
        await until(lambda: len(core.live) == 2, core)
        core.send_raw(msgspec.msgpack.encode(["outputs", b"", b"", [[0, "no such reason"]]]))
        with pytest.raises(RequestFailedError, match="request 0 failed: the core sent a malformed message of it"):
            await tasks[0]
        await until(lambda: core.aborted == [0], core)
        core.gate.set()
        assert await tasks[1] == "baba"
        assert llm.failure is None

    run(core, scenario)


@pytest.mark.parametrize("frame", [b"\xc1", encode(EngineCoreOutputs(b"\0" * 8, b"\0" * 4))])
def test_a_message_that_nobody_is_to_blame_for_ends_the_link(core: FakeCore, frame: bytes) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        core.gate.clear()
        task = asyncio.ensure_future(text_of(llm, "ab", tokens(4)))
        await until(lambda: len(core.live) == 1, core)
        core.send_raw(frame)
        for work in (task, text_of(llm, "ab", tokens(4)), llm.get_stats()):
            with pytest.raises(EngineDeadError, match="the connection to the engine was given up"):
                await work
        assert isinstance(llm.failure, EngineDeadError)
        core.gate.set()
        await until(lambda: not core.live, core)  # the core sees that nobody is there

    run(core, scenario)


def test_a_request_that_cannot_be_sent_leaves_nothing(core: FakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(_requests: object) -> None:
        raise OSError("no room")

    async def scenario(llm: AsyncLLM) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(llm._open.client, "add", add)
            with pytest.raises(OSError, match="no room"):
                await text_of(llm, "ab", tokens(2))
        assert not llm._states
        assert not llm._open.outputs.live
        assert await text_of(llm, "ab", tokens(2)) == "ba"

    run(core, scenario)


def test_news_are_there_at_first_then_waited_for_and_told_twice_count_once() -> None:
    async def scenario() -> None:
        news = News(asyncio.get_running_loop())
        await asyncio.wait_for(news.take(), _TIMEOUT_S)
        waiting = asyncio.ensure_future(news.take())
        await asyncio.sleep(0)
        assert not waiting.done()
        news.tell()
        news.tell()
        await asyncio.wait_for(waiting, _TIMEOUT_S)
        again = asyncio.ensure_future(news.take())
        await asyncio.sleep(0)
        assert not again.done()
        again.cancel()
        await asyncio.gather(again, return_exceptions=True)
        news.tell()  # nobody waits any more
        await asyncio.wait_for(news.take(), _TIMEOUT_S)

    asyncio.run(scenario())

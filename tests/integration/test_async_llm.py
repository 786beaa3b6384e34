"""`AsyncLLM` through all three processes, on a tiny model."""

import asyncio
import pathlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from folovllm import LLM, AsyncLLM, SamplingParams
from tests.integration.conftest import ENDLESS, ROOM, Daemon

_TIMEOUT_S = 60.0
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
LONG = SamplingParams(max_tokens=500, ignore_eos=True)


@pytest.fixture(scope="module")
def daemon(roomy_folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    made = Daemon(roomy_folder, f"ipc://{tmp_path_factory.mktemp('async')}/engine", *ROOM)
    try:
        made.wait_ready()
        yield made
    finally:
        made.close()


def run(daemon: Daemon, scenario: Callable[[AsyncLLM], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with AsyncLLM(engine=daemon.endpoint) as llm:
            await asyncio.wait_for(scenario(llm), _TIMEOUT_S)

    asyncio.run(bounded())


async def text_of(llm: AsyncLLM, prompt: str, params: SamplingParams, request_id: str | None = None) -> str:
    return "".join([out.outputs[0].text async for out in llm.generate(prompt, params, request_id=request_id)])


async def idle(llm: AsyncLLM) -> bool:
    async def wait() -> None:
        while True:
            stats = await llm.get_stats()
            if stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks == stats.num_blocks:
                return

    await asyncio.wait_for(wait(), _TIMEOUT_S)
    return True


def test_many_at_once_equal_the_batch(daemon: Daemon) -> None:
    prompts = [f"prompt {i % 10}" for i in range(100)]
    with LLM(engine=daemon.endpoint) as llm:
        expected = [output.outputs[0].text for output in llm.generate(prompts, GREEDY, use_tqdm=False)]

    async def scenario(llm: AsyncLLM) -> None:
        assert await asyncio.gather(*(text_of(llm, prompt, GREEDY) for prompt in prompts)) == expected
        assert await idle(llm)

    run(daemon, scenario)


def test_L22_cancelled_consumers_leave_nothing(daemon: Daemon) -> None:
    async def leave_after_one(llm: AsyncLLM) -> None:
        stream = llm.generate("abc", LONG)
        await anext(stream)
        await stream.aclose()

    async def scenario(llm: AsyncLLM) -> None:
        await asyncio.gather(*(leave_after_one(llm) for _ in range(100)))
        tasks = [asyncio.ensure_future(text_of(llm, "abc", ENDLESS)) for _ in range(300)]
        while not (await llm.get_stats()).num_waiting:
            pass  # some are still in the queue when they are cancelled
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        assert await idle(llm)
        assert not llm._open.outputs.live
        assert len(await text_of(llm, "abc", GREEDY)) > 0

    run(daemon, scenario)


def test_L23_one_id_twice_and_one_abort(daemon: Daemon) -> None:
    async def collect(llm: AsyncLLM, params: SamplingParams) -> tuple[int, str | None]:
        count, reason = 0, None
        async for output in llm.generate("abc", params, request_id="same"):
            assert output.request_id == "same"
            count += len(output.outputs[0].token_ids)
            reason = output.outputs[0].finish_reason
        return count, reason

    async def scenario(llm: AsyncLLM) -> None:
        tasks = [asyncio.ensure_future(collect(llm, params)) for params in (ENDLESS, LONG)]
        while not (await llm.get_stats()).num_running:
            pass
        assert await llm.abort("same")
        (_, first_reason), (second, second_reason) = await asyncio.gather(*tasks)
        assert first_reason == "abort"
        assert (second, second_reason) == (500, "length")
        assert await idle(llm)

    run(daemon, scenario)


@pytest.mark.parametrize("n", [3])
def test_n_answers_equal_those_of_llm(daemon: Daemon, n: int) -> None:
    params = SamplingParams(n=n, seed=5, max_tokens=10, ignore_eos=True)
    with LLM(engine=daemon.endpoint) as llm:
        expected = [answer.text for answer in llm.generate("abc", params, use_tqdm=False)[0].outputs]

    async def scenario(llm: AsyncLLM) -> None:
        texts = [""] * n
        async for output in llm.generate("abc", params):
            for answer in output.outputs:
                texts[answer.index] += answer.text
        assert texts == expected

    run(daemon, scenario)

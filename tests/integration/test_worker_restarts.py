"""A worker that dies under a real model: its requests get the very tokens that they would have got without it."""

import asyncio
import pathlib
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from folovllm import LLM, AsyncLLM, RequestFailedError, SamplingParams, StructuredOutputsParams
from tests.integration.conftest import Daemon, eventually, is_idle

END_WORKER = "tests.fakes.processors:end_worker"
BOUND_S = 90.0
NUM_BEFORE = 5  # tokens that every stream has when the worker dies
LONG: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True}
_PATTERN = StructuredOutputsParams(regex="([a-f]{3}-[0-9]){60}")
REQUESTS = [
    SamplingParams(temperature=0.0, **LONG),
    SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1, **LONG),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, **LONG),
    SamplingParams(temperature=0.0, min_tokens=100, stop=["zz"], **LONG),
    SamplingParams(temperature=1.0, seed=1, **LONG),
    SamplingParams(temperature=0.8, seed=2, n=2, top_p=0.9, frequency_penalty=0.3, **LONG),
    SamplingParams(temperature=1.0, seed=3, top_k=5, logprobs=0, **LONG),
    SamplingParams(temperature=1.0, seed=4, max_tokens=300, structured_outputs=_PATTERN),
]


@pytest.fixture(scope="module")
def daemon(tiny_folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    endpoint = f"ipc://{tmp_path_factory.mktemp('restarts')}/engine"
    made = Daemon(tiny_folder, endpoint, "--logits-processor", END_WORKER, "--max-worker-restarts", "4")
    try:
        made.wait_ready()
        yield made
    finally:
        made.close()


class Answer:
    """All that a stream brought."""

    def __init__(self) -> None:
        self.token_ids: dict[int, list[int]] = {}
        self.texts: dict[int, str] = {}
        self.logprobs: list[float] = []
        self.num_prompt_logprobs = 0
        self.reasons: dict[int, str | None] = {}

    async def take(self, llm: AsyncLLM, number: int, on_tokens: Callable[[], Awaitable[None]]) -> "Answer":
        async for output in llm.generate(f"the cat sat {number}", REQUESTS[number]):
            for part in output.outputs:
                self.token_ids.setdefault(part.index, []).extend(part.token_ids)
                self.texts[part.index] = self.texts.get(part.index, "") + part.text
                self.reasons[part.index] = part.finish_reason
                for token_id, place in zip(part.token_ids, part.logprobs or [], strict=False):
                    self.logprobs.append(place[token_id].logprob)
            if output.prompt_logprobs is not None:
                self.num_prompt_logprobs = len(output.prompt_logprobs)
            if min(map(len, self.token_ids.values()), default=0) >= NUM_BEFORE:
                await on_tokens()
        return self


def stream_all(daemon: Daemon, kill: Callable[[], None]) -> list[Answer]:
    """Every request at once; `kill` is called as soon as each of them has a few tokens."""

    async def scenario() -> list[Answer]:
        have_tokens: set[int] = set()
        is_killed = asyncio.Event()

        async def note(number: int) -> None:
            have_tokens.add(number)
            if len(have_tokens) == len(REQUESTS) and not is_killed.is_set():
                is_killed.set()
                kill()

        async with AsyncLLM(engine=daemon.endpoint) as llm:
            return await asyncio.gather(
                *(
                    Answer().take(llm, number, lambda number=number: note(number))  # type: ignore[misc]
                    for number in range(len(REQUESTS))
                )
            )

    async def bounded() -> list[Answer]:
        return await asyncio.wait_for(scenario(), BOUND_S)

    return asyncio.run(bounded())


def kill_worker(daemon: Daemon) -> None:
    (worker,) = (process for process in daemon.family() if "folovllm.worker_proc" in process.cmdline())
    worker.send_signal(signal.SIGKILL)


def test_before_equals_after_a_crash(daemon: Daemon) -> None:
    undisturbed = stream_all(daemon, lambda: None)
    disturbed = stream_all(daemon, lambda: kill_worker(daemon))
    for number, (then, now) in enumerate(zip(undisturbed, disturbed, strict=True)):
        assert now.token_ids == then.token_ids, number
        assert now.texts == then.texts, number
        assert now.reasons == then.reasons
        assert now.logprobs == pytest.approx(then.logprobs, abs=1e-4)
        assert now.num_prompt_logprobs == then.num_prompt_logprobs
    assert undisturbed[1].num_prompt_logprobs > 0
    assert len(undisturbed[1].logprobs) == len(undisturbed[6].logprobs) == 300
    with LLM(engine=daemon.endpoint) as llm:
        assert eventually(lambda: llm.get_stats().num_worker_restarts_total == 1)
        assert eventually(lambda: is_idle(llm))


def test_a_request_that_ends_its_worker_each_time_fails_alone_and_counts_alone(daemon: Daemon) -> None:
    async def text_of(llm: AsyncLLM, number: int) -> str:
        params = SamplingParams(temperature=1.0, seed=number, **LONG)
        return "".join([output.outputs[0].text async for output in llm.generate(f"the dog {number}", params)])

    async def fail(llm: AsyncLLM) -> None:
        with pytest.raises(RequestFailedError, match=r"in flight at 3 ends .*alone at the last.*exit code 77"):
            async for _ in llm.generate("the dog", SamplingParams(logits_processors={END_WORKER: 3}, **LONG)):
                pass

    async def scenario() -> None:
        async with AsyncLLM(engine=daemon.endpoint) as llm:
            num_restarts = (await llm.get_stats()).num_worker_restarts_total
            undisturbed = await asyncio.gather(*(text_of(llm, number) for number in range(4)))
            outcome = await asyncio.gather(fail(llm), *(text_of(llm, number) for number in range(4)))
            assert outcome[1:] == undisturbed
            assert (await llm.get_stats()).num_worker_restarts_total == num_restarts + 3
            kill_worker(daemon)  # the fifth end after the test above, where four are allowed in a row
            assert await text_of(llm, 0) == undisturbed[0]

    asyncio.run(asyncio.wait_for(scenario(), BOUND_S))

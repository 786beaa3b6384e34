"""Puts load on a server: requests at their times, or as many at once as allowed."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp

from folovllm.common.errors import ConfigError
from folovllm.frontend.benchmark.http_request import Record, Target, new_session, send
from folovllm.frontend.benchmark.workload import Work
from folovllm.frontend.event_loop import run_to_end


@dataclass(frozen=True, slots=True)
class Load:
    """When requests are sent.

    Attributes:
        arrivals: seconds from the start at which each one comes.
        max_concurrency: most requests at once, those that come meanwhile wait; None: no bound.
        num_warmups: requests that are sent one after another before the clock starts.
    """

    arrivals: Sequence[float]
    max_concurrency: int | None = None
    num_warmups: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The records in the order of the works, and the clock's reading when the first request was to be sent."""

    records: list[Record]
    began: float


def put_load(target: Target, works: Sequence[Work], load: Load, on_end: Callable[[Record], None]) -> Outcome:
    """Sends all works and waits for all answers.

    Args:
        target: where they go.
        works: what is asked.
        load: when; one arrival for each work.
        on_end: called whenever a request has ended.

    Raises:
        ConfigError: a warm-up failed; the message is the server's.
    """
    return run_to_end(_put_load(target, works, load, on_end))


async def _put_load(target: Target, works: Sequence[Work], load: Load, on_end: Callable[[Record], None]) -> Outcome:
    async with new_session(target) as session:
        for i in range(load.num_warmups):
            await _warm_up(session, target, works[i % len(works)])
        bound = contextlib.nullcontext() if load.max_concurrency is None else asyncio.Semaphore(load.max_concurrency)
        began = time.perf_counter()
        records = [Record(work, began + at) for work, at in zip(works, load.arrivals, strict=True)]

        async def one(record: Record) -> None:
            async with bound:
                if load.max_concurrency is not None:
                    record.planned = time.perf_counter()  # it waited for its turn, and not for this client
                await send(session, target, record)
            on_end(record)

        async with asyncio.TaskGroup() as group:
            for record in records:
                delay = record.planned - time.perf_counter()
                if delay > 0:
                    await asyncio.sleep(delay)
                group.create_task(one(record))
        return Outcome(records, began)


async def _warm_up(session: aiohttp.ClientSession, target: Target, work: Work) -> None:
    record = Record(work)
    await send(session, target, record)
    if record.error:
        raise ConfigError(f"the first request to {target.url} failed: {record.error}")

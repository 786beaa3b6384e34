"""A coroutine that ends by itself, by an error, or by a signal; the clean-up runs, and handlers are as before."""

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from folovllm.frontend.event_loop import run_to_end


@pytest.fixture(autouse=True)
def handlers_are_as_before() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_result() -> None:
    async def main() -> int:
        await asyncio.sleep(0)
        return 3

    assert run_to_end(main()) == 3


def test_an_error() -> None:
    async def main() -> None:
        raise ValueError("of the coroutine")

    with pytest.raises(ValueError, match="of the coroutine"):
        run_to_end(main())


@pytest.mark.parametrize("number, kind", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_cancels_it(number: int, kind: type[BaseException]) -> None:
    cleaned = []

    async def main() -> None:
        os.kill(os.getpid(), number)
        try:
            await asyncio.wait_for(asyncio.Event().wait(), 60)
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    with pytest.raises(kind) as caught:
        run_to_end(main())
    assert cleaned == [True]
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 143


def test_a_cancellation_of_its_own_stays_one() -> None:
    async def main() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run_to_end(main())

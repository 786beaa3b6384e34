"""An engine that is alive but stuck."""

import asyncio
from contextlib import suppress

import msgspec
import pytest

from folovllm.common.messages.frontend_core import EngineStats
from folovllm.frontend.server import heartbeat
from folovllm.frontend.server.heartbeat import STEP_BOUND_S, Heartbeat, Watch
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, run

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


def stats(*, steps: int, running: int = 1) -> EngineStats:
    return EngineStats(0, running, 0, 10, 10, 0, 0, 0, 0, 0, 1, steps, 0)


def test_a_core_that_does_not_answer() -> None:
    watch = Watch(5.0, 100.0)
    assert not watch.answered(stats(steps=1), 100.0).stuck
    first = watch.missed(105.0)
    assert first.stuck == "the engine has not answered for 5 s"
    assert not first.hopeless
    assert not watch.missed(129.0).hopeless
    assert watch.missed(130.0).hopeless
    assert not watch.answered(stats(steps=1), 131.0).stuck


def test_a_worker_that_finishes_no_step() -> None:
    watch = Watch(5.0, 0.0)
    assert not watch.answered(stats(steps=7), 0.0).stuck
    assert not watch.answered(stats(steps=7), STEP_BOUND_S - 1).stuck
    verdict = watch.answered(stats(steps=7), STEP_BOUND_S)
    assert verdict.stuck == "the engine has finished no step for 600 s"
    assert verdict.hopeless
    assert not watch.answered(stats(steps=8), STEP_BOUND_S + 1).stuck


def test_an_idle_engine_makes_no_steps() -> None:
    watch = Watch(5.0, 0.0)
    assert not watch.answered(stats(steps=7, running=0), 0.0).stuck
    assert not watch.answered(stats(steps=7, running=0), 10 * STEP_BOUND_S).stuck
    assert not watch.answered(stats(steps=7, running=1), 10 * STEP_BOUND_S + 5).stuck


def test_a_core_that_starts_a_worker_is_not_stuck() -> None:
    watch = Watch(5.0, 0.0)
    recovering = msgspec.structs.replace(stats(steps=7, running=0), num_waiting=3, is_recovering=True)
    for second in range(0, int(5 * STEP_BOUND_S), 50):
        assert not watch.answered(recovering, float(second)).stuck


def test_silence_of_the_core_is_not_counted_against_its_worker() -> None:
    watch = Watch(5.0, 0.0)
    watch.answered(stats(steps=7), 0.0)
    for i in range(1, 141):
        watch.missed(i * 5.0)
    assert not watch.answered(stats(steps=7), 701.0).stuck


def test_L36_nobody_waits_for_a_stuck_engine(core: FakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beat by beat, and with time for every answer: a machine that is held up looks like no stuck engine."""

    async def scenario(server: Served) -> None:
        beats = Heartbeat(server.context)
        await beats.beat()
        assert not server.context.stuck
        core.gate.clear()
        waiting = asyncio.ensure_future(server.post(CHAT, HELLO))  # no token comes
        assert await asyncio.to_thread(core.wait_until, lambda: len(core.live) == 1)
        await beats.beat()
        assert not server.context.stuck
        with monkeypatch.context() as patch:
            patch.setattr(heartbeat, "STEP_BOUND_S", 0.0)
            await beats.beat()
        assert (await waiting).json()["choices"][0]["finish_reason"] == "abort"
        refused = await server.post(CHAT, HELLO)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_stuck")
        assert refused.headers["Retry-After"] == "5"
        for path in ("/health", "/ready"):
            health = await server.http.get(path)
            assert (health.status_code, health.json()["status"]) == (503, "stuck")
        core.gate.set()
        await beats.beat()
        assert (await server.http.get("/health")).status_code == 200
        assert (await server.post(CHAT, HELLO)).status_code == 200

    run(core.endpoint, scenario, health_timeout_s=20.0)


def test_it_asks_until_it_is_cancelled(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        server.context.stuck = "of late"
        beats = asyncio.ensure_future(Heartbeat(server.context).run())
        for since in ("of late", "again"):
            server.context.stuck = since
            while server.context.stuck:
                await asyncio.sleep(0.001)
        beats.cancel()
        with suppress(asyncio.CancelledError):
            await beats

    run(core.endpoint, scenario, health_timeout_s=0.1)


def test_an_engine_without_a_worker_says_so_and_takes_requests(core: FakeCore) -> None:
    core.is_recovering = True

    async def scenario(server: Served) -> None:
        for path in ("/health", "/ready"):
            health = await server.http.get(path)
            assert (health.status_code, health.json()["status"]) == (503, "recovering")
            assert "worker has ended" in health.json()["message"]
        assert (await server.http.get("/metrics")).status_code == 200
        assert (await server.post(CHAT, HELLO)).status_code == 200  # the engine queues it

    run(core.endpoint, scenario)


def test_it_ends_with_the_engine(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        beats = asyncio.ensure_future(Heartbeat(server.context).run())
        core.fail("gone")
        await beats
        assert server.context.stuck == "gone"
        health = await server.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "dead")
        assert (await server.http.get("/metrics")).status_code == 200

    run(core.endpoint, scenario, health_timeout_s=0.05)

"""A load on a server of a script: order, bounds, warm-ups."""

import threading
import time
from collections.abc import Iterator

import pytest

from folovllm.common.errors import ConfigError
from folovllm.frontend.benchmark.http_request import Record, Target
from folovllm.frontend.benchmark.load import Load, put_load
from folovllm.frontend.benchmark.workload import Work
from tests.fakes.scripted_server import Answer, Asked, ScriptedServer, as_json, chat_events

WORKS = [Work(f"prompt {i}", 2, 3) for i in range(6)]


def target(server: ScriptedServer) -> Target:
    return Target(server.url + "/v1/chat/completions", "chat", "m", None, {})


def prompts(server: ScriptedServer) -> list[str]:
    return [asked.body["messages"][0]["content"] for asked in server.asked]


class Crowd:
    """A script that counts who is in work, and lets nobody go before `expected` are."""

    def __init__(self, expected: int) -> None:
        self.now = self.most = 0
        self._expected = expected
        self._changed = threading.Condition()

    def __call__(self, _: Asked) -> Answer:
        return Answer(self._parts(), kind="text/event-stream")

    def _parts(self) -> Iterator[bytes]:
        with self._changed:
            self.now += 1
            self.most = max(self.most, self.now)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.most >= self._expected, 60)
        first, *rest = chat_events("a").parts
        yield first
        with self._changed:
            self.now -= 1
        yield from rest


def test_all_at_once() -> None:
    crowd, ended = Crowd(len(WORKS)), list[Record]()
    with ScriptedServer(crowd) as server:
        outcome = put_load(target(server), WORKS, Load([0.0] * 6), ended.append)
    assert crowd.most == 6
    assert [record.work for record in outcome.records] == WORKS
    assert sorted(map(id, ended)) == sorted(map(id, outcome.records))
    assert all(not record.error and record.sent >= outcome.began for record in outcome.records)


def test_no_more_at_once_than_allowed() -> None:
    crowd = Crowd(2)
    with ScriptedServer(crowd) as server:
        outcome = put_load(target(server), WORKS, Load([0.0] * 6, max_concurrency=2), lambda _: None)
    assert crowd.most == 2
    assert all(record.planned <= record.sent for record in outcome.records)


def test_nothing_is_sent_before_its_time() -> None:
    arrivals = [0.0, 0.02, 0.02, 0.03, 0.05, 0.06]
    with ScriptedServer(lambda _: chat_events("a")) as server:
        outcome = put_load(target(server), WORKS, Load(arrivals), lambda _: None)
        assert sorted(prompts(server)) == [work.prompt for work in WORKS]
    for record, at in zip(outcome.records, arrivals, strict=True):
        assert record.planned == pytest.approx(outcome.began + at)
        assert record.sent >= record.planned - 0.002  # the loop's clock counts milliseconds


def test_warm_ups_come_first_one_after_another_and_do_not_count() -> None:
    with ScriptedServer(lambda _: chat_events("a")) as server:
        before = time.perf_counter()
        outcome = put_load(target(server), WORKS[:2], Load([0.0] * 2, num_warmups=3), lambda _: None)
        assert prompts(server)[:3] == ["prompt 0", "prompt 1", "prompt 0"]
        assert len(server.asked) == 5
    assert len(outcome.records) == 2 and outcome.began > before


def test_a_warm_up_that_fails_ends_it() -> None:
    with (
        ScriptedServer(lambda _: as_json({"error": {"message": "no"}}, 404)) as server,
        pytest.raises(ConfigError, match=r"the first request to http.*/v1/chat/completions failed: status 404: .*no"),
    ):
        put_load(target(server), WORKS, Load([0.0] * 6, num_warmups=1), lambda _: None)


def test_one_failure_does_not_end_the_others() -> None:
    def script(asked: Asked) -> Answer:
        return as_json({}, 500) if asked.body["messages"][0]["content"] == "prompt 3" else chat_events("a")

    with ScriptedServer(script) as server:
        outcome = put_load(target(server), WORKS, Load([0.0] * 6), lambda _: None)
    assert [bool(record.error) for record in outcome.records] == [False, False, False, True, False, False]

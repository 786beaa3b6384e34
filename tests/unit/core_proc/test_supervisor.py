"""Sequences of a worker's ends, and what is decided after each."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm.core_proc.supervisor import NUM_CRASHES_OF_A_SUSPECT, SERVED_LONG_S, Decision, Supervisor


@dataclasses.dataclass(eq=False)
class Crashed:
    """A request as the supervisor sees it."""

    name: str
    num_crashes: int = 0


class Engine:
    """Counts as the scheduler does, and runs on as the decisions say."""

    def __init__(self, max_restarts: int) -> None:
        self.supervisor = Supervisor(max_restarts, 0.0)
        self.now_s = 0.0

    def crash(self, *in_flight: Crashed, after_s: float = 1.0) -> Decision[Crashed]:
        self.now_s += after_s
        for request in in_flight:
            request.num_crashes += 1
        decision = self.supervisor.lost(in_flight, self.now_s)
        if not decision.give_up:
            self.now_s += 1.0
            self.supervisor.ready(self.now_s)
        return decision


def test_one_crash_proves_nothing() -> None:
    assert Engine(1).crash(Crashed("a"), Crashed("b")) == Decision()


def test_a_worker_that_ends_idle_is_replaced() -> None:
    assert Engine(1).crash() == Decision()


def test_who_was_in_flight_twice_is_suspected_and_newcomers_are_not() -> None:
    engine, first, second, newcomer = Engine(9), Crashed("a"), Crashed("b"), Crashed("c")
    engine.crash(first, second)
    assert engine.crash(second, newcomer, first) == Decision(suspects=[second, first])


def test_a_suspect_that_is_in_flight_alone_at_another_crash_fails_and_the_others_stay() -> None:
    engine, culprit, innocent = Engine(9), Crashed("a"), Crashed("b")
    engine.crash(culprit, innocent)
    assert engine.crash(culprit, innocent).suspects == [culprit, innocent]
    assert engine.crash(culprit) == Decision(failed=[culprit])


def test_a_request_that_is_always_alone_fails_at_the_third_crash() -> None:
    engine, request = Engine(9), Crashed("a")
    decisions = [engine.crash(request) for _ in range(3)]
    assert decisions == [Decision(), Decision(suspects=[request]), Decision(failed=[request])]


def test_what_failed_requests_did_is_not_counted_against_the_engine() -> None:
    engine = Engine(3)
    for name in "abcdefgh":
        culprit = Crashed(name)
        assert [engine.crash(culprit).give_up for _ in range(3)] == ["", "", ""]
    assert not engine.crash().give_up


def test_a_suspect_that_was_cleared_counts_anew() -> None:
    engine, request = Engine(9), Crashed("a")
    engine.crash(request)
    engine.crash(request)
    request.num_crashes = 0  # what the scheduler does when it is cleared
    assert engine.crash(request) == Decision()


def test_many_in_flight_at_a_third_crash_are_suspected_again_and_none_fails() -> None:
    engine, requests = Engine(9), [Crashed("a"), Crashed("b")]
    decisions = [engine.crash(*requests) for _ in range(3)]
    assert decisions[2] == Decision(suspects=requests)


@pytest.mark.parametrize("max_restarts", [0, 1, 3])
def test_the_row_has_a_bound(max_restarts: int) -> None:
    engine = Engine(max_restarts)
    assert not any(engine.crash().give_up for _ in range(max_restarts))
    decision = engine.crash(Crashed("a"))
    assert f"max_worker_restarts={max_restarts}" in decision.give_up
    assert not decision.suspects
    assert not decision.failed


def test_a_worker_that_has_served_long_begins_a_new_row() -> None:
    engine = Engine(2)
    for _ in range(20):
        assert not engine.crash(after_s=SERVED_LONG_S).give_up
    assert not engine.crash(after_s=SERVED_LONG_S - 2).give_up
    assert "3 workers in a row" in engine.crash().give_up


def test_the_time_of_a_start_is_no_service() -> None:
    supervisor = Supervisor(3, 0.0)
    starts_that_fail: list[Decision[Crashed]] = [
        supervisor.lost([], number * 2 * SERVED_LONG_S) for number in range(1, 5)
    ]
    assert [bool(decision.give_up) for decision in starts_that_fail] == [False, False, False, True]


@pytest.mark.parametrize(("was_ready", "gives_up"), [(True, False), (False, True)])
def test_a_cause_that_does_not_go_away_is_final_for_a_start_only(was_ready: bool, gives_up: bool) -> None:
    supervisor = Supervisor(5, 0.0)
    if not was_ready:
        supervisor.lost([], 1.0)
    assert bool(supervisor.lost([], 2.0, is_final=True).give_up) is gives_up


@given(
    culprits=st.sets(st.integers(0, 5)),
    num_requests=st.integers(1, 6),
    max_restarts=st.integers(0, 30),
)
def test_whoever_ends_workers_fails_alone_and_nobody_else(
    culprits: set[int], num_requests: int, max_restarts: int
) -> None:
    """Requests of which some end every worker that computes them; suspects run alone until they are past the place."""
    engine, requests = Engine(max_restarts), [Crashed(str(index)) for index in range(num_requests)]
    guilty = {request for index, request in enumerate(requests) if index in culprits}
    running, suspects, num_crashes = list(requests), list[Crashed](), 0
    while any(request in guilty for request in running):
        in_flight = suspects[:1] or running
        if not any(request in guilty for request in in_flight):
            suspects.pop(0).num_crashes = 0  # cleared
            continue
        decision, num_crashes = engine.crash(*in_flight), num_crashes + 1
        if decision.give_up:
            assert num_crashes == max_restarts + 1
            return
        suspects += [request for request in decision.suspects if request not in suspects]
        for request in decision.failed:
            assert request in guilty
            running.remove(request)
            suspects.remove(request)
    assert set(running) == set(requests) - guilty
    assert num_crashes <= max(0, NUM_CRASHES_OF_A_SUSPECT * len(guilty) + 1)

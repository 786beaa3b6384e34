"""A recorded run comes out the same when it is made again; a run that was tampered with does not."""

import pathlib
import random
import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest

from folovllm.common.trace_file import Arrived, Resulted, Scheduled, TraceHeader, TraceRecord, TraceWriter, WorkerLost
from folovllm.core_proc.replay import Replay, replay
from folovllm.core_proc.request import RequestStatus
from tests.fakes.simulated_grammar import SimulatedGrammar
from tests.fakes.traced_engine import HEADER, TracedEngine
from tests.sources import ROOT

OPTIONS: list[dict[str, Any]] = [
    {"num_blocks": 64},
    {"num_blocks": 9, "depth": 1},
    {"num_blocks": 9, "policy": "priority", "max_num_seqs": 4, "max_num_batched_tokens": 9},
    {"num_blocks": 20, "enable_prefix_caching": False},
    {
        "num_blocks": 30,
        "long_prefill_token_threshold": 5,
        "max_num_partial_prefills": 2,
        "max_num_batched_tokens": 16,
    },
    {"num_blocks": 30, "target_itl_s": 2.0, "max_num_batched_tokens": 16},
]


def header_of(**options: Any) -> TraceHeader:
    names = {"policy": "scheduling_policy", "depth": "pipeline_depth"}
    return msgspec.structs.replace(HEADER, **{names.get(name, name): value for name, value in options.items()})


def random_run(seed: int, options: dict[str, Any]) -> TracedEngine:
    """Prompts that share beginnings, forks, aborts, time-outs, failed steps and resets, in any order."""
    chance = random.Random(seed)
    engine = TracedEngine(**options)
    for _ in range(60):
        live = [request for request in engine.requests if not request.is_finished]
        match chance.randrange(10):
            case 0 | 1 | 2 if len(live) < 12:
                prompt = [3] * chance.choice([0, 4, 8]) + [chance.randrange(3) for _ in range(chance.randint(1, 9))]
                engine.add(
                    prompt,
                    n=chance.choice([1, 1, 3]),
                    max_tokens=chance.randint(1, 14),
                    stop_token_ids=list(range(0, 97, 9)) if chance.random() < 0.3 else [],
                    stream=chance.random() < 0.5,
                    priority=chance.randrange(3),
                    cache_salt=chance.choice(["", "", "tenant"]),
                    prompt_logprobs=chance.choice([None, None, 1]),
                    grammar=chance.choice([None, None, "at once"]),
                )
            case 3 if live:
                status = chance.choice([RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_TIMED_OUT])
                engine.finish(chance.sample(live, min(2, len(live))), status)
            case 4 if chance.random() < 0.2:
                engine.reset_prefix_cache()
            case 5 if len(engine.in_flight) < 2 and chance.random() < 0.2:
                engine.schedule(fails=True)
            case 6 if chance.random() < 0.2:
                engine.lose_worker(lambda lost: lost[:2])
            case _:
                engine.turn()
    engine.run()
    return engine


def steps_of(records: list[TraceRecord]) -> int:
    return sum(isinstance(record, Scheduled) for record in records)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(4))
def test_a_run_comes_out_the_same(seed: int, options: dict[str, Any]) -> None:
    engine = random_run(seed, options)
    assert replay(header_of(**options), engine.records) == (steps_of(engine.records), "")


def test_these_runs_have_what_can_differ() -> None:
    engines = [random_run(seed, options) for seed in range(4) for options in OPTIONS]
    assert sum(engine.scheduler.counters.num_preemptions for engine in engines) > 5
    assert sum(engine.scheduler.counters.num_cache_hits for engine in engines) > 100
    records = [record for engine in engines for record in engine.records]
    assert any(isinstance(record, Resulted) and record.error for record in records)
    assert any(isinstance(record, Arrived) and record.parent is not None for record in records)
    assert any(isinstance(record, WorkerLost) and len(record.suspects) > 1 for record in records)


def test_what_the_worker_has_memory_for_is_known_again() -> None:
    engine = TracedEngine(depth=1, max_num_batched_tokens=16, max_num_seqs=4)
    engine.add(40, max_tokens=3)
    engine.schedule()
    engine.update(lambda output: msgspec.structs.replace(output, max_num_tokens=5))
    engine.run()
    header = header_of(depth=1, max_num_batched_tokens=16, max_num_seqs=4)
    assert replay(header, engine.records) == (steps_of(engine.records), "")
    assert [record.max_num_tokens for record in engine.records if isinstance(record, Resulted)] == [5] + [0] * 7


def test_masks_that_were_late_are_late_again() -> None:
    engine = TracedEngine(depth=1)
    (late,) = engine.add(5, max_tokens=6, grammar="late")
    engine.add(5, max_tokens=20)
    for turn in range(25):
        if turn % 3 == 0 and isinstance(late.grammar, SimulatedGrammar):
            late.grammar.fill()
        if engine.scheduler.has_unfinished:
            engine.turn()
    engine.check_end()
    assert steps_of(engine.records) == 20
    assert replay(header_of(depth=1), engine.records) == (20, "")


def changed(records: list[TraceRecord], index: int, **fields: object) -> list[TraceRecord]:
    return [*records[:index], msgspec.structs.replace(records[index], **fields), *records[index + 1 :]]


def test_another_budget_is_noticed_at_the_first_step_that_differs() -> None:
    engine = TracedEngine(max_num_batched_tokens=16, depth=1)
    engine.add(10, max_tokens=3)
    engine.add(10, max_tokens=3)
    engine.run()
    num_steps, difference = replay(header_of(max_num_batched_tokens=20), engine.records)
    assert num_steps == 0
    assert difference.startswith("step 0 at ")
    assert "num_scheduled_tokens: [10, 6], now [10, 10]" in difference


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        (Scheduled, {"num_free_blocks": 3}, "num_free_blocks: 3, now 6"),
        (Scheduled, {"step_id": 9}, "step_id: 9, now 0"),
        (Resulted, {"token_ids": b""}, "is not possible here: ProtocolError"),
        (Resulted, {"step_id": 5}, "is not possible here: ProtocolError"),
        (Arrived, {"parent": 12}, "is not possible here: KeyError"),
        (Arrived, {"request": 12}, "request: 12, now 0"),
    ],
)
def test_what_was_tampered_with_is_named(kind: type, fields: dict[str, object], text: str) -> None:
    engine = TracedEngine(num_blocks=8, depth=1)
    engine.add(5, max_tokens=2)
    engine.run()
    index = next(index for index, record in enumerate(engine.records) if isinstance(record, kind))
    _, difference = replay(header_of(num_blocks=8), changed(engine.records, index, **fields))
    assert text in difference


def test_a_step_that_is_not_made_any_more_is_named() -> None:
    engine = TracedEngine(num_blocks=8, depth=1)
    engine.add(5, max_tokens=1)
    engine.run()
    again = Replay(header_of(num_blocks=8))
    for record in engine.records:
        assert again.apply(record) == ""
    assert "was recorded; now: nothing" in again.apply(engine.records[1])


def run_program(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "folovllm.core_proc.replay", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_program_replays_a_file_and_tells_differences(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace"
    engine = TracedEngine()
    engine.add(5, max_tokens=3)
    engine.run()
    for num_blocks in (64, 9):  # the second run has a header that is not its own
        writer = TraceWriter(path, header_of(num_blocks=num_blocks))
        for record in engine.records:
            writer.write(record)
        writer.close()
    code, out, err = run_program(str(path), "--run", "1")
    assert (code, out, err) == (0, "3 steps of 1 requests made again: the same decisions\n", "")
    code, out, _ = run_program(str(path))
    assert code == 1
    assert out.startswith("After 0 steps: step 0 at ")
    path.write_bytes(path.read_bytes()[:-5])
    code, _, err = run_program(str(path), "--run", "2")
    assert code == 1
    assert "the file ends within a record" in err


def test_the_program_refuses_what_is_no_trace(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(np.arange(9).tobytes())
    code, _, err = run_program(str(path))
    assert code == 2
    assert "is no trace" in err

"""The steps that the bare loop computes, against what a worker accepts; and how its two ways are compared."""

import argparse
from typing import cast

import numpy as np
import pytest
import torch

from bench import engine_overhead, report
from bench.engine_overhead import BareLoop, measure, steps_of
from folovllm import LLM
from folovllm.worker_proc.request_states import RequestStates
from folovllm.worker_proc.step_arrays import StepLimits

LIMITS = StepLimits(
    num_slots=20,
    max_model_len=64,
    max_num_batched_tokens=16 * 20,
    num_blocks=1 + 20 * 2,
    block_size=16,
    vocab_size=100,
    num_valid_token_ids=100,
)


class ScriptedLoop(BareLoop):
    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int, int]] = []

    def step_ms(self, batch: int, prompt_len: int, num_decodes: int, seed: int) -> float:
        self.asked.append((batch, prompt_len, num_decodes, seed))
        return 10.0


def test_every_request_computes_its_prompt_once_and_then_one_token_a_step() -> None:
    prompts = [[7] * 20 for _ in range(20)]
    steps = list(steps_of(prompts, 3))
    assert [len(step.new_requests) for step in steps] == [16, 4, 0, 0, 0]
    assert [len(np.frombuffer(step.slots, "<i4")) for step in steps] == [16, 4, 20, 20, 20]
    blocks = [np.frombuffer(new.block_ids, "<i4").tolist() for step in steps for new in step.new_requests]
    assert sorted(block for own in blocks for block in own) == list(range(1, 41))


def test_a_worker_accepts_them() -> None:
    states = RequestStates(LIMITS, torch.device("cpu"))
    num_tokens = []
    for step in steps_of([[7] * 20 for _ in range(20)], 2):
        arrays = states.apply(step)
        slots, query_lens = torch.from_numpy(arrays.slots), torch.from_numpy(arrays.query_lens)
        states.advance(arrays, slots, query_lens, arrays.slots)
        num_tokens.append(int(arrays.query_lens.sum()))
    assert num_tokens == [16 * 20, 4 * 20, 20, 20]


def test_the_overhead_is_the_median_of_the_turns_own_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = iter([99.0, 10.5, 11.0, 20.0])  # the first is the warm-up's
    monkeypatch.setattr(engine_overhead, "engine_step_ms", lambda _llm, *_size: next(engine))
    loop = ScriptedLoop()
    given = argparse.Namespace(repeats=3, prompt_len=32, output_len=8, seed=5)
    point = measure(cast("LLM", None), loop, 64, given)
    assert (point.batch, point.bare_ms, point.engine_ms) == (64, 10.0, 11.0)
    assert point.overhead_percent == pytest.approx(10.0)
    assert {size[:3] for size in loop.asked} == {(64, 32, 8)}
    assert len({size[3] for size in loop.asked}) == 4  # other prompts in each turn


def test_its_table_names_the_goals_that_there_are() -> None:
    points = [
        {"batch": 1, "bare_ms": 10.0, "engine_ms": 10.3, "overhead_percent": 3.0},
        {"batch": 16, "bare_ms": 20.0, "engine_ms": 19.8, "overhead_percent": -1.0},
    ]
    options = {"prompt_len": 32, "output_len": 48, "model": "demo", "dtype": "bfloat16"}
    shown = report.engine_overhead({"options": options, "points": points, "goals_percent": {"1": 4.0, "64": 8.0}})
    assert "| 1 | 10.00 | 10.30 | +3.0 % | 4 % |" in shown
    assert "| 16 | 20.00 | 19.80 | -1.0 % |  |" in shown

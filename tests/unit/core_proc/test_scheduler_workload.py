"""Five hundred requests at random, through every mechanism at once, against what each would answer alone."""

import random
from typing import Any

import pytest

from folovllm.core_proc.request import RequestStatus
from tests.fakes.simulated_engine import SimulatedEngine

NUM_REQUESTS = 500
SHARED = [[(7 * index + seed) % 11 for index in range(40)] for seed in range(4)]


def random_request(chance: random.Random) -> tuple[list[int], dict[str, Any]]:
    """A prompt that often begins like others, and options."""
    beginning = chance.choice(SHARED)[: chance.randrange(41)]
    prompt = beginning + [chance.randrange(97) for _ in range(chance.randrange(1, 30))]
    options = {
        "n": chance.choice([1, 1, 1, 1, 2, 4]),
        "max_tokens": chance.randrange(1, 40),
        "min_tokens": chance.choice([0, 0, 3]),
        "stop_token_ids": chance.choice([[], [5, 40, 70], list(range(0, 97, 9))]),
        "priority": chance.randrange(3),
        "stream": chance.random() < 0.5,
        "seed": chance.randrange(2**40),
        "cache_salt": chance.choice(["", "", "", "tenant"]),
        "skip_reading_prefix_cache": chance.random() < 0.05,
    }
    return prompt, options


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "engine_options",
    [
        {"num_blocks": 400, "max_num_seqs": 32, "max_num_batched_tokens": 256},
        {"num_blocks": 60, "max_num_seqs": 16, "max_num_batched_tokens": 48, "policy": "priority"},
        {
            "num_blocks": 90,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 40,
            "long_prefill_token_threshold": 13,
            "max_num_partial_prefills": 2,
        },
        {"num_blocks": 60, "max_num_seqs": 12, "max_num_batched_tokens": 24, "target_itl_s": 3.0},
        {"num_blocks": 80, "max_num_seqs": 16, "max_num_batched_tokens": 64, "enable_prefix_caching": False},
    ],
    ids=["roomy", "tight-priority", "chunks", "target", "no-cache"],
)
def test_every_answer_is_the_one_it_would_be_alone(engine_options: dict[str, Any], depth: int) -> None:
    chance = random.Random(depth)
    engine = SimulatedEngine(block_size=4, max_model_len=128, depth=depth, **engine_options)
    num_aborted = 0
    while len(engine.requests) < NUM_REQUESTS:
        for _ in range(chance.choice([0, 0, 1, 1, 2, 8])):
            prompt, options = random_request(chance)
            engine.add(prompt, **options)
        engine.turn()
        live = [request for request in engine.requests[-40:] if not request.is_finished]
        if live and chance.random() < 0.03:
            num_aborted += len(engine.finish([chance.choice(live)], RequestStatus.FINISHED_ABORTED))
    engine.run(max_turns=20_000)  # checks every answer, and that every block is free
    ends = [request.finish_reason for request in engine.requests]
    assert ends.count("abort") == num_aborted > 0
    assert {"stop", "length", "abort"} == set(ends)
    counters = engine.scheduler.counters
    if engine.manager.enable_prefix_caching:
        assert counters.num_cache_hits > 0.2 * counters.num_cache_queries
    if engine_options["num_blocks"] == 60:
        assert counters.num_preemptions > 0
        assert engine.pool.num_evicted > 0

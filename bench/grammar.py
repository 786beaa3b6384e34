"""What grammars cost: compiling, one mask, and the core's step when 8 of 256 requests have one.

    python -m bench.grammar [--model demo] [--steps 300]

Masks: random texts are written under each schema of `tests/fakes/schemas.py`; a mask's time is that of taking one token
in and filling the mask for the next, in this thread. Core step: as in `bench.core_step`, without sockets, with the two
threads of the real core; the steps counted are those in which the requests with a grammar take part.
"""

import argparse
import collections
import json
import pathlib
import select
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the package and the fakes, uninstalled

import numpy as np

from bench.common import print_table, write_json
from bench.workload import percentile
from folovllm.common.messages.core_worker import ModelRunnerOutput, SamplingRow, SchedulerOutput
from folovllm.common.messages.frontend_core import Grammar
from folovllm.common.model_config import read_model_config
from folovllm.common.transport import encode
from folovllm.core_proc.block_pool import BlockPool
from folovllm.core_proc.grammar import CompiledGrammar, Matcher, Vocabulary
from folovllm.core_proc.grammar_threads import Grammars
from folovllm.core_proc.kv_cache_manager import KVCacheManager
from folovllm.core_proc.request import Request
from folovllm.core_proc.request_queue import RequestQueue
from folovllm.core_proc.scheduler import Scheduler
from folovllm.frontend.model_hub import resolve
from tests.fakes.fake_worker import int32_bytes, ints
from tests.fakes.schemas import ENFORCED

_TEXTS = 10
_MAX_TOKENS = 150
_ENDLESS = Grammar("regex", r'(\{"name": "[a-zA-Z ]{1,30}", "number": -?[0-9]{1,9}\}\n)*')
_NO_STOPS = np.empty(0, np.int32)
_PROMPT_TOKENS = 16
_WARM_UP_STEPS = 20


def _allowed(mask: bytes) -> "np.ndarray[Any, np.dtype[np.int64]]":
    return np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))


def measure_masks(vocabulary: Vocabulary) -> dict[str, Any]:
    """Microseconds of every mask over all schemas, and milliseconds of compiling each."""
    random = np.random.default_rng(0)
    masks_us: list[float] = []
    compile_ms: list[float] = []
    for schema in ENFORCED.values():
        begun = time.perf_counter_ns()
        compiled = CompiledGrammar(Grammar("json", json.dumps(schema)), vocabulary)
        compile_ms.append((time.perf_counter_ns() - begun) / 1e6)
        for _ in range(_TEXTS):
            masks_us += _write(Matcher(compiled, _NO_STOPS), random)
    return {
        "schemas": len(ENFORCED),
        "masks": len(masks_us),
        "mask_median_us": round(statistics.median(masks_us), 1),
        "mask_p99_us": round(percentile(masks_us, 99), 1),
        "mask_max_us": round(max(masks_us), 1),
        "compile_median_ms": round(statistics.median(compile_ms), 2),
        "compile_max_ms": round(max(compile_ms), 2),
    }


def _write(matcher: Matcher, random: np.random.Generator) -> list[float]:
    times: list[float] = []
    mask: bytes | None = matcher.mask
    while mask is not None and len(times) < _MAX_TOKENS:
        token_id = int(random.choice(_allowed(mask)))
        begun = time.perf_counter_ns()
        mask = matcher.take(token_id)
        times.append((time.perf_counter_ns() - begun) / 1e3)
    assert not matcher.error, matcher.error
    return times


class _MaskedModel:
    """Decodes: a random allowed token where there is a mask, the same token everywhere else."""

    def __init__(self, num_words: int) -> None:
        self._mask_bytes = 4 * num_words
        self._random = np.random.default_rng(1)
        self._missing: dict[int, int] = {}

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        masked, size = ints(step.masked_slots), self._mask_bytes
        masks = {slot: step.token_masks[i * size : (i + 1) * size] for i, slot in enumerate(masked)}
        tokens = [int(self._random.choice(_allowed(masks[slot]))) if slot in masks else 7 for slot in ints(step.slots)]
        return ModelRunnerOutput(step.step_id, int32_bytes(tokens))


def measure_core_step(vocabulary: Vocabulary, num_held: int, depth: int, num_steps: int) -> dict[str, Any]:
    """Median and 99th percentile of the core's microseconds for a step of 256 requests, `num_held` with a grammar."""
    num_requests = 256
    grammars = Grammars(lambda: vocabulary)
    scheduler = Scheduler(
        kv_cache_manager=KVCacheManager(BlockPool(num_requests * (4 + num_steps // 16) + 64), 16),
        queue=RequestQueue("fcfs"),
        max_num_seqs=num_requests,
        max_num_batched_tokens=num_requests * _PROMPT_TOKENS,
        max_model_len=8192,
    )
    prompt = np.arange(_PROMPT_TOKENS, dtype=np.int32)
    requests = [
        Request(0, i, "bench", prompt, SamplingRow(), max_tokens=8000, stream=True) for i in range(num_requests)
    ]
    if num_held:
        grammars.compile(_ENDLESS, requests[:num_held])
        assert select.select([grammars.fd], [], [], 60.0)[0], "the grammar does not come"
        grammars.take_compiled()
    for request in requests:
        scheduler.add_request(request)
    try:
        times = _run(scheduler, grammars, _MaskedModel(vocabulary.num_words), depth, num_steps)
    finally:
        grammars.close()
    return {
        "held": num_held,
        "depth": depth,
        "step_median_us": round(statistics.median(times), 1),
        "step_p99_us": round(percentile(times, 99), 1),
    }


def _run(scheduler: Scheduler, grammars: Grammars, model: _MaskedModel, depth: int, num_steps: int) -> list[float]:
    """Microseconds of turns that submit a step with masks (or any step, where there are none)."""
    in_flight: collections.deque[ModelRunnerOutput] = collections.deque()
    times: list[float] = []
    has_masks = False
    while len(times) < num_steps + _WARM_UP_STEPS:
        begun = time.perf_counter_ns()
        if in_flight:
            scheduler.update_from_output(in_flight.popleft(), 0.0)
        assert not grammars.settle(), "the grammar has no end"
        steps: list[SchedulerOutput] = []
        while len(in_flight) + len(steps) < depth and (step := scheduler.schedule(0.0)) is not None:
            encode(step)
            steps.append(step)
        taken_us = (time.perf_counter_ns() - begun) / 1e3
        in_flight += [model.execute(step) for step in steps]
        has_masks = has_masks or any(step.masked_slots for step in steps)
        if not has_masks or any(step.masked_slots for step in steps):
            times.append(taken_us)
    return times[_WARM_UP_STEPS:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="whose tokenizer it is")
    parser.add_argument("--steps", type=int, default=300, help="steps measured for each row")
    options = parser.parse_args()
    folder = pathlib.Path(resolve(options.model))
    begun = time.perf_counter()
    vocabulary = Vocabulary.from_folder(folder, read_model_config(folder).vocab_size)
    vocabulary_s = round(time.perf_counter() - begun, 2)
    masks = {"vocabulary": vocabulary.num_valid_token_ids, "vocabulary_s": vocabulary_s, **measure_masks(vocabulary)}
    cases = [(held, depth) for depth in (1, 2) for held in (0, 1, 8, 32)]
    steps = [measure_core_step(vocabulary, held, depth, options.steps) for held, depth in cases]
    print("Masks of random texts under JSON schemas:")
    print_table(list(masks), [list(masks.values())])
    print("\nMicroseconds of core time for a step of 256 requests, some held to a grammar, without sockets:")
    print_table(list(steps[0]), [list(row.values()) for row in steps])
    write_json("grammar", {"masks": masks, "steps": steps})


if __name__ == "__main__":
    main()

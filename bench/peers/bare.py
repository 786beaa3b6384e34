"""This engine's worker alone: `ModelRunner.execute` for the very steps that the scheduler makes, put one after another.

No processes, sockets, text or scheduling in the time taken; the difference to `own` is what the engine costs.
"""

import time
from collections.abc import Iterator

import numpy as np

import folovllm
from bench.peers.peer import Answer, Options
from folovllm.common.config import EngineConfig
from folovllm.common.messages.core_worker import SamplingRow, SchedulerOutput
from folovllm.common.messages.lifecycle import ConfigureWorker
from folovllm.core_proc.block_pool import BlockPool
from folovllm.core_proc.kv_cache_manager import KVCacheManager
from folovllm.core_proc.request import Request
from folovllm.core_proc.request_queue import RequestQueue
from folovllm.core_proc.scheduler import Scheduler
from folovllm.worker_proc.phases import Phases
from folovllm.worker_proc.startup import Startup
from tests.fakes.fake_worker import FastModel


def steps_for(
    prompts: list[list[int]], num_tokens: int, config: EngineConfig, num_blocks: int
) -> Iterator[SchedulerOutput]:
    """The steps that the core would send for these requests, all put at once and alone in the engine."""
    scheduler = Scheduler(
        kv_cache_manager=KVCacheManager(BlockPool(num_blocks), config.block_size),
        queue=RequestQueue("fcfs"),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max(map(len, prompts)) + num_tokens,
    )
    for number, prompt in enumerate(prompts):
        ids = np.asarray(prompt, np.int32)
        scheduler.add_request(Request(0, number, str(number), ids, SamplingRow(), max_tokens=num_tokens))
    model = FastModel()
    while (step := scheduler.schedule(0.0)) is not None:
        yield step
        scheduler.update_from_output(model.execute(step), 0.0)


class Bare:
    """A runner in this process."""

    version = folovllm.__version__

    def __init__(self, options: Options) -> None:
        assert options.max_model_len is not None and options.max_num_seqs is not None
        self._config = EngineConfig(
            model=options.form,
            dtype="bfloat16",
            device="cpu",
            cpu_threads=options.threads,
            kv_cache_memory_gb=2.0,
            max_num_seqs=options.max_num_seqs,
        )
        configure = ConfigureWorker(self._config, 0, options.max_model_len)
        self._runner, ready = Startup(configure, Phases("bench", time.time()), lambda: None).run()
        self._num_blocks = ready.num_blocks

    def answer(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        steps = list(steps_for(prompts, num_tokens, self._config, self._num_blocks))
        outputs, first_s = [], 0.0
        began = time.perf_counter()
        for step in steps:
            outputs.append(self._runner.execute(step).wait())
            if step.new_requests or step.num_scheduled_tokens:
                first_s = time.perf_counter() - began
        seconds = time.perf_counter() - began
        seen = [np.frombuffer(new.token_ids, "<i4").tolist() for step in steps for new in step.new_requests]
        answers = collect(steps, [output.token_ids for output in outputs])
        return Answer(seconds, first_s, seen, answers)


def collect(steps: list[SchedulerOutput], token_ids: list[bytes]) -> list[list[int]]:
    """Each request's tokens, requests in the order in which they came into a step."""
    missing: dict[int, int] = {}  # slot → prompt tokens still to come
    held: dict[int, list[int]] = {}  # slot → the answer of the request that holds it
    answers: list[list[int]] = []
    for step, tokens in zip(steps, token_ids, strict=True):
        for new in step.new_requests:
            missing[new.slot], held[new.slot] = new.num_prompt_tokens - new.num_computed_tokens, []
            answers.append(held[new.slot])
        slots = np.frombuffer(step.slots, "<i4").tolist()
        counts = np.frombuffer(step.num_scheduled_tokens, "<i4").tolist()
        sampled = iter(np.frombuffer(tokens, "<i4").tolist())
        for slot, count in zip(slots, [1] * (len(slots) - len(counts)) + counts, strict=True):
            missing[slot] = max(missing[slot] - count, 0)
            if missing[slot] == 0:
                held[slot].append(next(sampled))
    return answers


def open_peer(options: Options) -> Bare:
    return Bare(options)

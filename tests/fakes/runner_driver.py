"""The least of a core that a ModelRunner needs: gives out blocks, writes steps, keeps what requests should be.

A request's tokens are appended when a step's result is read (`collect`), counts already when it is submitted, so steps
may be submitted ahead of their results.
"""

import dataclasses
import pathlib
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from folovllm.common.messages.core_worker import ModelRunnerOutput, SamplingRow, SchedulerOutput
from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.attention.backend import AttentionBackend
from folovllm.worker_proc.attention.paged import PagedBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.model_runner import ModelRunner
from folovllm.worker_proc.models.registry import CausalLM, build_model
from folovllm.worker_proc.output_thread import PendingOutput
from folovllm.worker_proc.request_states import RequestStates
from folovllm.worker_proc.sample.processors import LogitsProcessor
from folovllm.worker_proc.step_arrays import StepLimits
from folovllm.worker_proc.weights import load_weights
from tests.fakes.fake_core import int32, ints, new_request

GREEDY = SamplingRow()
CPU_FLOAT32 = Placement(torch.device("cpu"), torch.float32)


def load_model(folder: pathlib.Path, max_model_len: int) -> CausalLM:
    model = build_model(read_model_config(folder), CPU_FLOAT32, max_model_len)
    load_weights(model, folder)
    return model


def make_runner(
    model: CausalLM,
    folder: pathlib.Path,
    limits: StepLimits,
    *,
    backend: AttentionBackend | None = None,
    num_valid_token_ids: int | None = None,
    processors: Mapping[str, LogitsProcessor] | None = None,
) -> ModelRunner:
    """A runner with an empty cache and empty rows; the model may be shared, it has no state."""
    config = read_model_config(folder)
    kv = KVTensors(config, limits.num_blocks, limits.block_size, CPU_FLOAT32)
    if num_valid_token_ids is not None:
        limits = dataclasses.replace(limits, num_valid_token_ids=num_valid_token_ids)
    states = RequestStates(limits, CPU_FLOAT32.device)
    attention = backend or PagedBackend(config.num_attention_heads)
    return ModelRunner(model, attention, kv, states, processors=processors)


@dataclasses.dataclass
class Tracked:
    """A request as the driver knows it."""

    tokens: list[int]
    num_prompt: int
    sampling: SamplingRow
    num_known: int
    num_computed: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)
    is_new: bool = True

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]


class Driver:
    """Drives one runner."""

    def __init__(self, runner: ModelRunner, limits: StepLimits) -> None:
        self.runner = runner
        self.requests: dict[int, Tracked] = {}
        self._limits = limits
        self._free = deque(range(1, limits.num_blocks))
        self._pending: deque[tuple[PendingOutput, list[Tracked]]] = deque()
        self._step_id = 0

    def join(
        self, slot: int, tokens: Sequence[int], sampling: SamplingRow = GREEDY, *, num_prompt: int | None = None
    ) -> Tracked:
        """Puts a request into a slot; it is sent with its first step."""
        self.leave(slot)
        prompt = len(tokens) if num_prompt is None else num_prompt
        self.requests[slot] = Tracked(list(tokens), prompt, sampling, len(tokens))
        return self.requests[slot]

    def leave(self, slot: int) -> None:
        if slot in self.requests:
            self._free.extend(self.requests.pop(slot).blocks)

    def step(self, counts: Mapping[int, int]) -> ModelRunnerOutput:
        """Submits a step of `counts` tokens per slot and reads its result."""
        self.submit(counts)
        return self.collect()

    def submit(self, counts: Mapping[int, int]) -> None:
        order = sorted(counts, key=lambda slot: counts[slot] > 1)
        new, append_slots, append_ids = [], [], []
        sampling = []
        for slot in order:
            request = self.requests[slot]
            request.num_computed += counts[slot]
            added = self._take_blocks(request)
            if request.is_new:
                computed = request.num_computed - counts[slot]
                fields = {"num_prompt_tokens": request.num_prompt, "num_computed_tokens": computed}
                new.append(new_request(slot, request.tokens, request.blocks, request.sampling, **fields))
                request.is_new = False
            else:
                append_slots += [slot] * len(added)
                append_ids += added
            if request.num_computed == request.num_known:
                request.num_known += 1
                sampling.append(request)
        step = SchedulerOutput(
            self._step_id,
            int32(order),
            int32(counts[slot] for slot in order if counts[slot] > 1),
            new,
            int32(append_slots),
            int32(append_ids),
        )
        self._step_id += 1
        self._pending.append((self.runner.execute(step), sampling))

    def collect(self) -> ModelRunnerOutput:
        """Reads the oldest result."""
        result, sampling = self._pending.popleft()
        output = result.wait()
        for request, token in zip(sampling, ints(output.token_ids), strict=True):
            request.tokens.append(token)
        return output

    def finish(self, slot: int, num_output: int) -> list[int]:
        """Runs a request alone, the rest of its prompt in one step, up to `num_output` output tokens."""
        request = self.requests[slot]
        while len(request.output) < num_output:
            self.step({slot: request.num_known - request.num_computed})
        return request.output

    def _take_blocks(self, request: Tracked) -> list[int]:
        needed = -(-request.num_computed // self._limits.block_size) - len(request.blocks)
        added = [self._free.popleft() for _ in range(needed)]
        request.blocks += added
        return added

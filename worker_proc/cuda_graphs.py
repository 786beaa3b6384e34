"""Captured steps: one in which every request computes one token and samples is one replay, others are two.

Everything such a step needs is read from the persistent rows inside the graph (inputs, positions, block tables,
sampling parameters), and everything it makes is written back there, so that between two steps of the same requests the
host says nothing to the device but "again". What the host decides is the graph: by the number of requests, rounded up
to a bucket (rows of padding have slot -1: they read and write nothing), by the parts that long contexts are split into,
and by what sampling needs: nothing but the largest, drawing, or filters.

A step with chunks of prompts is told what to do in one copy (`step_plan`), and is a captured forward pass
(`forward_graphs`) and a captured sampling of the requests that have got to their end. Before, some 60 small operators
gathered its inputs and sampled: 3.4 ms of the host's time on an H200's machine, where the network took 2.7 for a prompt
of 1,024 tokens.

A step whose requests ask for more than that (penalties, biases, masks, log probabilities) is not taken: its
forward pass is captured all the same, and the runner samples by torch's operators.

Graphs of decode steps are captured when they are first needed. Capturing runs the step once with nothing but padding
(which compiles kernels and lets cuBLAS choose), then records it: some 0.1 s. All graphs share one memory pool, since
they run one after another.

Prior art: CUDA graphs for decoding as in vLLM and nano-vllm (a graph per batch size); there inputs are copied into the
graph's buffers each step.
"""

import dataclasses

import numpy as np
import torch

from folovllm.common.log import get_logger
from folovllm.common.messages.core_worker import ModelRunnerOutput
from folovllm.common.sampling_params import GREEDY_TEMPERATURE
from folovllm.worker_proc.attention.triton_paged import TritonPagedBackend
from folovllm.worker_proc.forward_graphs import ForwardGraphs
from folovllm.worker_proc.graph_memory import GraphMemory
from folovllm.worker_proc.input_batch import InputBatch
from folovllm.worker_proc.kernels.triton.decode_rows import gather_decode_inputs
from folovllm.worker_proc.kernels.triton.sampling import (
    DRAWN,
    FILTERED,
    GREEDY,
    SamplingRows,
    SamplingScratch,
    sample_decodes,
)
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.models.registry import CausalLM
from folovllm.worker_proc.output_thread import PendingOutput
from folovllm.worker_proc.request_states import MIN_P, MIN_TOKENS, NUM_PROMPT, TEMPERATURE, TOP_K, TOP_P, RequestStates
from folovllm.worker_proc.step_arrays import StepArrays
from folovllm.worker_proc.step_plan import Scheduled
from folovllm.worker_proc.wire_fields import Ids

_SAMPLING_BUCKETS = (1, 8, 32, 64, 128, 256, 512)
_RING = 8  # results on their way to the host at once; the core has at most two steps in flight
_PADDING = -1
_VOID = -1

logger = get_logger(__name__)


@dataclasses.dataclass(slots=True)
class _Batch:
    """The requests of the last replayed step, and what need not be looked at again while they stay the same."""

    key: bytes
    slots: Ids
    needs: int
    plain_from: Ids | None


def decode_buckets(most: int) -> list[int]:
    """Numbers of rows that graphs are captured for: dense where steps are short, up to 8 % padding beyond."""
    buckets = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 513, 32), *range(576, most + 64, 64)]
    return [bucket for bucket in buckets if bucket < most] + [most]


class GraphResult:
    """A replayed step's tokens on their way to the host."""

    def __init__(self, step_id: int, event: torch.cuda.Event, tokens: "np.ndarray[tuple[int], np.dtype[np.int32]]"):
        self.step_id = step_id
        self._event = event
        self._tokens = tokens

    def wait(self) -> ModelRunnerOutput:
        """The result, once the device has it."""
        self._event.synchronize()
        void = np.flatnonzero(self._tokens == _VOID)
        return ModelRunnerOutput(self.step_id, self._tokens.astype("<i4").tobytes(), void.astype("<i4").tobytes())


class CudaGraphs:
    """See `step_graphs.StepGraphs`. All collaborators are shared with the runner."""

    def __init__(
        self,
        model: CausalLM,
        backend: TritonPagedBackend,
        kv: KVTensors,
        states: RequestStates,
    ) -> None:
        self._model = model
        self._backend = backend
        self._kv = kv
        self._states = states
        self._num_columns = states.limits.num_valid_token_ids
        most, device = states.limits.num_slots, states.device
        self._buckets = decode_buckets(most)
        self._slots = torch.full((most,), _PADDING, dtype=torch.int64, device=device)
        self._inputs = [torch.zeros(most, dtype=torch.int64, device=device) for _ in range(3)]
        self._tokens = torch.zeros(most, dtype=torch.int32, device=device)
        self._scratch = SamplingScratch(most, self._num_columns, device)
        self._rows = SamplingRows(states.floats, states.integers, states.token_ids)
        self._uploads = [torch.empty(most, dtype=torch.int64, pin_memory=True) for _ in range(_RING)]
        self._downloads = [torch.empty(most, dtype=torch.int32, pin_memory=True) for _ in range(_RING)]
        self._events = [torch.cuda.Event(blocking=True) for _ in range(_RING)]
        self._turn = 0
        self._memory = GraphMemory()
        self._forward = ForwardGraphs(model, backend, kv, states, self._memory)
        self._graphs: dict[tuple[int, int, int, int], torch.cuda.CUDAGraph] = {}
        self._sampling_graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._batch: _Batch | None = None

    def replay(self, step_id: int, arrays: StepArrays) -> PendingOutput | None:
        """See `step_graphs.StepGraphs`."""
        slots, counts = arrays.slots, self._states.counts
        num_rows = len(slots)
        if arrays.new_rows:
            self._batch = None  # a slot of the same number may be somebody else's now
        if len(arrays.masked_slots):
            return None
        seq_lens = counts.num_computed[slots] + arrays.query_lens
        samples = seq_lens == counts.num_tokens[slots]
        if arrays.num_decodes < num_rows or not samples.all():
            step = Scheduled(slots, arrays.query_lens, seq_lens, arrays.num_decodes, np.flatnonzero(samples))
            return self._replay_chunks(step_id, step)
        batch = self._batch_of(arrays)
        if batch is None:
            return None
        if batch.plain_from is not None and bool((seq_lens < batch.plain_from).any()):
            return None
        bucket = next(size for size in self._buckets if size >= num_rows)
        key = (bucket, *self._backend.choose_parts(bucket, int(seq_lens.max())), batch.needs)
        graph = self._graphs.get(key) or self._capture(key)
        if graph is None:
            return None
        if batch is not self._batch:
            self._upload(slots)
            self._batch = batch
        graph.replay()
        counts.num_computed[slots] = seq_lens
        counts.num_tokens[slots] += 1
        return self._download(step_id, num_rows)

    def forward(self, batch: InputBatch) -> torch.Tensor | None:
        """See `step_graphs.StepGraphs`."""
        return self._forward.forward(batch)

    def prepare_ahead(self) -> bool:
        """See `step_graphs.StepGraphs`."""
        return not self._events[self._turn - 1].query() or self._forward.prepare_ahead()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:  # noqa: ARG002 - one product, as fast uncaptured
        """See `step_graphs.StepGraphs`."""
        return None

    def _replay_chunks(self, step_id: int, step: Scheduled) -> PendingOutput | None:
        """A step in which some compute more than one token, or do not sample."""
        states, sampling = self._states, step.slots[step.samples]
        if states.reports_prompt[step.slots].any() or (needs := self._needs(sampling)) is None:
            return None
        plain_from = self._plain_from(sampling)
        if plain_from is not None and bool((step.seq_lens[step.samples] < plain_from).any()):
            return None
        graph = self._sampling_graph(len(sampling), needs) if len(sampling) else None
        if (graph is None and len(sampling)) or (key := self._forward.prepare(step)) is None:
            return None
        self._forward.run(key, step)
        if graph is not None:
            graph.replay()
        states.counts.num_computed[step.slots] = step.seq_lens
        states.counts.num_tokens[sampling] += 1
        return self._download(step_id, len(sampling))

    def _batch_of(self, arrays: StepArrays) -> _Batch | None:
        """What is known of the step's requests; None if some need more than a graph does."""
        last = self._batch
        if last is not None and arrays.key[0] == last.key:
            return last
        needs = self._needs(arrays.slots)
        return None if needs is None else _Batch(arrays.key[0], arrays.slots, needs, self._plain_from(arrays.slots))

    def _needs(self, slots: Ids) -> int | None:
        """What sampling for these requests needs at most; None if some need more than a graph has."""
        states = self._states
        floats, integers = states.host_floats[slots], states.host_integers[slots]
        if not states.is_plain[slots].all():
            return None
        greedy = (floats[:, TEMPERATURE] < GREEDY_TEMPERATURE) | (integers[:, TOP_K] == 1)
        filtered = (integers[:, TOP_K] > 0) | (floats[:, TOP_P] < 1.0) | (floats[:, MIN_P] > 0.0)
        return GREEDY if greedy.all() else FILTERED if (filtered & ~greedy).any() else DRAWN

    def _plain_from(self, slots: Ids) -> Ids | None:
        """The numbers of tokens from which on their stop sets need not be masked; None if that is all along."""
        integers = self._states.host_integers[slots]
        min_tokens = integers[:, MIN_TOKENS]
        return integers[:, NUM_PROMPT] + min_tokens if min_tokens.any() else None

    def _upload(self, slots: Ids) -> None:
        """Tells the device who is in the batch: one copy."""
        staging = self._uploads[self._turn]
        host = staging.numpy()
        host[: len(slots)] = slots
        host[len(slots) :] = _PADDING
        self._slots.copy_(staging, non_blocking=True)

    def _download(self, step_id: int, num_rows: int) -> GraphResult:
        host, event = self._downloads[self._turn], self._events[self._turn]
        self._turn = (self._turn + 1) % _RING
        host.copy_(self._tokens, non_blocking=True)
        event.record()
        return GraphResult(step_id, event, host.numpy()[:num_rows])

    def _capture(self, key: tuple[int, int, int, int]) -> torch.cuda.CUDAGraph | None:
        self._slots.fill_(_PADDING)
        self._batch = None
        captured = self._memory.capture(lambda: self._compute(key))
        if captured is None:
            return None
        self._graphs[key], _ = captured
        logger.debug("captured a step of %d rows, %d parts of at least %d keys, sampling %d", *key)
        return self._graphs[key]

    def _sampling_graph(self, count: int, needs: int) -> torch.cuda.CUDAGraph | None:
        """Sampling after a pass with chunks for `count` requests; captured now if need be."""
        most, plan = len(self._slots), self._forward.plan
        rows = next((size for size in _SAMPLING_BUCKETS if count <= size <= most), most)

        def compute() -> None:
            logits = self._model.compute_logits(self._forward.selected[:rows])
            requests = plan.sampling_slots[:rows], plan.sampling_lens[:rows]
            self._sample(logits, *requests, needs)

        if (rows, needs) not in self._sampling_graphs:
            plan.clear()
            if (captured := self._memory.capture(compute)) is None:
                return None
            self._sampling_graphs[rows, needs] = captured[0]
            logger.debug("captured sampling of %d rows, kind %d", rows, needs)
        return self._sampling_graphs[rows, needs]

    def _sample(self, logits: torch.Tensor, slots: torch.Tensor, seq_lens: torch.Tensor, needs: int) -> None:
        tokens = self._tokens[: len(slots)]
        sample_decodes(logits, self._num_columns, slots, seq_lens, self._rows, self._scratch, tokens, needs=needs)

    def _compute(self, key: tuple[int, int, int, int]) -> None:
        """One decode step, as it is captured."""
        rows, num_parts, min_part, needs = key
        states, slots = self._states, self._slots[:rows]
        input_ids, positions, seq_lens = (buffer[:rows] for buffer in self._inputs)
        gather_decode_inputs(slots, states.num_computed, states.token_ids, input_ids, positions, seq_lens)
        attention = self._backend.begin_decode(self._kv, slots, seq_lens, states.block_table, (num_parts, min_part))
        logits = self._model.compute_logits(self._model.forward(input_ids, positions, attention))
        self._sample(logits, slots, seq_lens, needs)

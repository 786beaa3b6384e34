"""Captured forward passes: prompts, prompts beside decoding requests, and decodes that the runner samples for.

An eager step launches some 300 kernels from Python; on the measured machine that takes 12 ms, four times as long as
1,024 tokens take on an H100. A captured one is a single launch. Its shape is fixed, so tokens are laid out with room to
spare: first the decoding requests (up to a bucket), then the chunks' tokens (up to another). What is not filled is
padding: a length of 0, a place of -1 in the cache, tiles without tokens. Which token goes where is planned on the host
and sent in one copy (`step_plan`); ids, positions and places are made from it on the device, inside the graph.

Capturing takes as long as several eager steps, so a pass is captured when it is wanted for the second time, or while
there is nothing to do. Buckets are few for the same reason: of decodes, of tokens, and of the longest context.

A prompt that is the only one in its step, whole and without decodes beside it, has passes of its own: its attention
needs no cache and goes through cuDNN. Other steps of more than 4,096 tokens stay eager: from some 5,000 tokens on the
device takes longer than the launches.
"""

import dataclasses
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from folovllm.common.log import get_logger
from folovllm.worker_proc.attention.backend import AttentionStep
from folovllm.worker_proc.attention.triton_paged import TritonPagedBackend
from folovllm.worker_proc.graph_memory import GraphMemory
from folovllm.worker_proc.input_batch import InputBatch
from folovllm.worker_proc.kernels.triton.paged_prefill import FIELDS
from folovllm.worker_proc.kernels.triton.step_layout import lay_out_step
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.models.registry import CausalLM
from folovllm.worker_proc.request_states import RequestStates
from folovllm.worker_proc.step_plan import PassInputs, Scheduled, StepPlan

_CHUNK_BUCKETS = (0, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
_PROMPT_BUCKETS = (*range(0, 513, 64), *range(640, 1025, 128), *range(1280, 2049, 256), *range(2560, 4097, 512))
_PROMPT_BUCKETS = (*_PROMPT_BUCKETS, *range(5120, 16385, 1024))
_DECODE_BUCKETS = (0, 16, 64, 256)
_SPARE_TILES = 32  # a chunk's last tile may be partly filled: so many chunks more than full tiles fit
_NO_TILES: Final = np.zeros((0, FIELDS), np.int32)

logger = get_logger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class ForwardKey:
    """What a captured pass is made for.

    Attributes:
        decodes, tokens: decoding requests, and tokens of chunks, that there is room for.
        parts: see `TritonPagedBackend.choose_parts`.
        is_prompt: the step is one whole prompt.
    """

    decodes: int
    tokens: int
    parts: tuple[int, int] = (1, 128)
    is_prompt: bool = False


class ForwardGraphs:
    """Captures and replays forward passes; `memory` is what all graphs share.

    Attributes:
        plan: of the step that runs.
        selected: [num_slots, hidden_size]; after a pass the hidden states of the tokens that are sampled after.
    """

    def __init__(
        self,
        model: CausalLM,
        backend: TritonPagedBackend,
        kv: KVTensors,
        states: RequestStates,
        memory: GraphMemory,
    ) -> None:
        self._model = model
        self._backend = backend
        self._kv = kv
        self._states = states
        self._memory = memory
        device, most = states.device, states.limits.num_slots
        self._decode_buckets = [size for size in _DECODE_BUCKETS if size < most]
        self._decode_buckets.append(most)
        self._most = min(_PROMPT_BUCKETS[-1], states.limits.max_num_batched_tokens)
        max_tiles = max(self._num_tiles(tokens) for tokens in _PROMPT_BUCKETS)
        self._inputs = PassInputs.empty(most + _PROMPT_BUCKETS[-1], max_tiles, device)
        self.plan = StepPlan(most, max_tiles, device)
        embeddings = model.parts().embedding
        self.selected = embeddings.new_zeros(most, embeddings.shape[1])
        self._takes_prompts = kv.data.dtype.itemsize == 2  # for float32 cuDNN has none; an FP8 cache is to be read
        self._graphs: dict[ForwardKey, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._wanted: set[ForwardKey] = set()

    def forward(self, batch: InputBatch) -> torch.Tensor | None:
        """Hidden states [T, hidden_size] of the step's tokens; None if there is no graph for such a step."""
        metadata, index = batch.metadata, batch.index
        lens = np.array(metadata.query_lens), np.array(metadata.seq_lens)
        step = Scheduled(index.host_slots, *lens, metadata.num_decodes, np.flatnonzero(index.samples))
        if (key := self.prepare(step)) is None:
            return None
        hidden, count = self.run(key, step), step.num_decodes
        chunks = hidden[key.decodes : key.decodes + step.num_chunk_tokens]
        return torch.cat((hidden[:count], chunks)) if count else chunks

    def prepare(self, step: Scheduled) -> ForwardKey | None:
        """The captured pass for the step, captured now if need be; None if there is none."""
        num_tokens, count = step.num_chunk_tokens, step.num_decodes
        if num_tokens > self._most:
            return None
        if self._takes_prompts and count == 0 and step.seq_lens.tolist() == [num_tokens]:
            key = ForwardKey(0, _bucket(_PROMPT_BUCKETS, num_tokens), is_prompt=True)
        elif num_tokens <= _CHUNK_BUCKETS[-1]:
            key = self._key(step.seq_lens[:count].tolist(), num_tokens)
        else:
            return None
        tile_tokens = self._backend.tile_sizes(key.tokens)[1]
        if int((-(-step.query_lens[count:] // tile_tokens)).sum()) > key.tokens // tile_tokens + _SPARE_TILES:
            return None
        if key in self._graphs:
            return key
        if key not in self._wanted:
            self._wanted.add(key)
            return None
        return key if self._capture(key) else None

    def prepare_ahead(self) -> bool:
        """Captures a pass that was wanted; False if there is none. For when there is nothing else to do."""
        return bool(self._wanted) and self._capture(next(iter(self._wanted)))

    def run(self, key: ForwardKey, step: Scheduled) -> torch.Tensor:
        """Hidden states of the pass's tokens, padding between decodes and chunks and after them.

        The step is counted as computed on the device.
        """
        tiles, count = _NO_TILES, step.num_decodes
        if key.tokens:
            chunk_lens = step.query_lens[count:].tolist(), step.seq_lens[count:].tolist()
            tiles = self._backend.plan_tiles(chunk_lens, step.slots[count:], key.decodes, key.tokens)
        self.plan.fill(step, key.decodes, tiles, self._num_tiles(key.tokens))
        graph, hidden = self._graphs[key]
        graph.replay()
        return hidden

    def _key(self, decode_lens: list[int], num_tokens: int) -> ForwardKey:
        decodes, tokens = _bucket(self._decode_buckets, len(decode_lens)), _bucket(_CHUNK_BUCKETS, num_tokens)
        if not decodes:
            return ForwardKey(0, tokens)
        return ForwardKey(decodes, tokens, self._backend.choose_parts(decodes, max(decode_lens)))

    def _num_tiles(self, tokens: int) -> int:
        return tokens // self._backend.tile_sizes(tokens)[1] + _SPARE_TILES + self._backend.tile_parts(tokens)

    def _capture(self, key: ForwardKey) -> bool:
        self._wanted.discard(key)
        self.plan.clear()
        captured = self._memory.capture(lambda: self._compute(key))
        if captured is None:
            return False
        self._graphs[key] = captured
        logger.debug("captured a forward pass: %s", key)
        return True

    def _compute(self, key: ForwardKey) -> torch.Tensor:
        size, num_tiles, states, plan = key.decodes + key.tokens, self._num_tiles(key.tokens), self._states, self.plan
        rows = states.token_ids, states.block_table, states.num_computed
        lay_out_step(plan, rows, self._inputs, (key.decodes, key.tokens, num_tiles), self._kv.block_size)
        inputs, attention = self._inputs, self._attention(key, num_tiles)
        hidden = self._model.forward(inputs.input_ids[:size], inputs.positions[:size], attention)
        torch.index_select(hidden, 0, plan.sampling_tokens, out=self.selected)
        return hidden

    def _attention(self, key: ForwardKey, num_tiles: int) -> AttentionStep:
        places = self._inputs.places[: key.decodes + key.tokens]
        if key.is_prompt:
            return self._backend.begin_prompt(self._kv, places)
        decodes = self.plan.decode_slots[: key.decodes], self.plan.decode_lens[: key.decodes]
        table = self._states.block_table
        if not key.tokens:
            return self._backend.begin_decode(self._kv, *decodes, table, key.parts)
        chunks = self._inputs.tiles[:num_tiles], places, key.decodes
        return self._backend.begin_padded(self._kv, table, (*decodes, key.parts), chunks)


def _bucket(buckets: Sequence[int], count: int) -> int:
    """The smallest bucket that `count` fits into."""
    return next(size for size in buckets if size >= count)

"""Captured forward passes: prompts, prompts beside decoding requests, and decodes that the runner samples for.

An eager step launches some 300 kernels from Python; on the measured machine that takes 12 ms, four times as long as
1,024 tokens take on an H100. A captured one is a single launch. Its shape is fixed, so tokens are laid out with room to
spare: first the decoding requests (up to a bucket), then the chunks' tokens (up to another). What is not filled is
padding: a length of 0, a place of -1 in the cache, tiles without tokens. Block tables are those of the persistent rows.

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
from folovllm.worker_proc.host_to_device import upload
from folovllm.worker_proc.input_batch import InputBatch
from folovllm.worker_proc.kernels.triton.paged_prefill import FIELDS, plan_tiles
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.models.registry import CausalLM
from folovllm.worker_proc.request_states import RequestStates

_CHUNK_BUCKETS = (0, 64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096)
_PROMPT_BUCKETS = (*_CHUNK_BUCKETS, *range(5120, 16385, 1024))
_DECODE_BUCKETS = (0, 8, 32, 64, 128, 256, 512)
_SPARE_TILES = 32  # a chunk's last tile may be partly filled: so many chunks more than full tiles fit
_NO_PLACE = -1
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
    """Captures and replays forward passes; `memory` is what all graphs share."""

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
        device = states.device
        self._decode_buckets = [size for size in _DECODE_BUCKETS if size < states.limits.num_slots]
        self._decode_buckets.append(states.limits.num_slots)
        self._most = min(_PROMPT_BUCKETS[-1], states.limits.max_num_batched_tokens)
        size = self._decode_buckets[-1] + _PROMPT_BUCKETS[-1]
        self._input_ids, self._positions, self._places = (
            torch.zeros(size, dtype=torch.int64, device=device) for _ in range(3)
        )
        self._slots, self._seq_lens = (
            torch.zeros(self._decode_buckets[-1], dtype=torch.int64, device=device) for _ in range(2)
        )
        self._tiles = torch.zeros(self._num_tiles(_CHUNK_BUCKETS[-1]), FIELDS, dtype=torch.int32, device=device)
        self._takes_prompts = kv.data.dtype.itemsize == 2  # for float32 cuDNN has none; an FP8 cache is to be read
        self._graphs: dict[ForwardKey, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def forward(self, batch: InputBatch) -> torch.Tensor | None:
        """Hidden states [T, hidden_size] of the step's tokens; None if there is no graph for such a step."""
        metadata = batch.metadata
        num_decodes, num_tokens = metadata.num_decodes, len(batch.input_ids) - metadata.num_decodes
        if num_tokens > self._most:
            return None
        if self._takes_prompts and num_tokens and metadata.seq_lens == [num_tokens]:
            key = ForwardKey(0, _bucket(_PROMPT_BUCKETS, num_tokens), is_prompt=True)
            tiles = _NO_TILES
        elif num_tokens <= _CHUNK_BUCKETS[-1]:
            key = self._key(metadata.seq_lens[:num_decodes], num_tokens)
            rows, tile_tokens = batch.index.host_slots[num_decodes:], self._backend.tile_sizes(key.tokens)[1]
            chunk_lens = metadata.query_lens[num_decodes:], metadata.seq_lens[num_decodes:]
            tiles = plan_tiles(*chunk_lens, rows, key.decodes, tile_tokens) if num_tokens else _NO_TILES
        else:
            return None
        if len(tiles) > self._num_tiles(key.tokens):
            return None
        captured = self._graphs.get(key) or self._capture(key)
        if captured is None:
            return None
        graph, hidden = captured
        self._fill(batch, key, tiles)
        graph.replay()
        chunks = hidden[key.decodes : key.decodes + num_tokens]
        return torch.cat((hidden[:num_decodes], chunks)) if num_decodes else chunks

    def _key(self, decode_lens: list[int], num_tokens: int) -> ForwardKey:
        decodes = next(size for size in self._decode_buckets if size >= len(decode_lens))
        tokens = next(size for size in _CHUNK_BUCKETS if size >= num_tokens)
        return ForwardKey(
            decodes, tokens, self._backend.choose_parts(decodes, max(decode_lens)) if decodes else (1, 128)
        )

    def _num_tiles(self, tokens: int) -> int:
        return tokens // self._backend.tile_sizes(tokens)[1] + _SPARE_TILES

    def _fill(
        self, batch: InputBatch, key: ForwardKey, tiles: "np.ndarray[tuple[int, int], np.dtype[np.int32]]"
    ) -> None:
        """Lays the step's tokens out as the graph expects them."""
        metadata, count = batch.metadata, batch.metadata.num_decodes
        end = key.decodes + len(batch.input_ids) - count
        for buffer, values in ((self._input_ids, batch.input_ids), (self._positions, batch.positions)):
            buffer[:count] = values[:count]
            buffer[key.decodes : end] = values[count:]
        self._places[key.decodes : end] = metadata.slot_mapping[count:]
        self._places[end : key.decodes + key.tokens] = _NO_PLACE
        self._slots[:count] = batch.index.slots[:count]
        self._seq_lens[:count] = metadata.seq_lens_device[:count]
        self._seq_lens[count : key.decodes] = 0
        if key.is_prompt or not key.tokens:
            return
        padded = np.zeros((self._num_tiles(key.tokens), FIELDS), np.int32)
        padded[: len(tiles)] = tiles
        self._tiles[: len(padded)] = upload(padded, self._states.device)

    def _capture(self, key: ForwardKey) -> tuple[torch.cuda.CUDAGraph, torch.Tensor] | None:
        self._seq_lens.zero_()
        self._places.fill_(_NO_PLACE)
        self._tiles.zero_()
        captured = self._memory.capture(lambda: self._compute(key))
        if captured is not None:
            self._graphs[key] = captured
            logger.debug("captured a forward pass: %s", key)
        return captured

    def _compute(self, key: ForwardKey) -> torch.Tensor:
        size = key.decodes + key.tokens
        if key.is_prompt:
            attention: AttentionStep = self._backend.begin_prompt(self._kv, self._places[:size])
            return self._model.forward(self._input_ids[:size], self._positions[:size], attention)
        if not key.tokens:
            decodes = self._slots[: key.decodes], self._seq_lens[: key.decodes]
            attention = self._backend.begin_decode(self._kv, *decodes, self._states.block_table, key.parts)
            return self._model.forward(self._input_ids[:size], self._positions[:size], attention)
        attention = self._backend.begin_padded(
            self._kv,
            self._states.block_table,
            (self._slots[: key.decodes], self._seq_lens[: key.decodes], key.parts),
            (self._tiles[: self._num_tiles(key.tokens)], self._places[:size], key.decodes),
        )
        return self._model.forward(self._input_ids[:size], self._positions[:size], attention)


def _bucket(buckets: Sequence[int], count: int) -> int:
    """The smallest bucket that `count` fits into."""
    return next(size for size in buckets if size >= count)

"""Attention from the blocks with batched torch operators.

Decoding requests share one batched product per group of similar length: the query heads of a KV head are the rows of a
small matrix, so K and V are read once for the whole group of heads and never expanded. Their blocks are fetched by one
gather a layer, straight into the product's shape (see `kv_tensors`). Requests are put together only while the longest
is at most twice as long as the shortest, which bounds the padding to half of what is read.

What lies past a request's end has a weight of 0, which does not silence an infinity or NaN that the block's last owner
left there (float16 overflows): 0 · NaN is NaN, in a request that has no part in it. So a block is zeroed in the step
that first writes to it and leaves its end open, and blocks that a request has yet to reach are read as the null block.

Chunks and prompts go through scaled_dot_product_attention, request by request. The query heads of a group see the same
K and V through a stride of 0. A prompt without context needs no gather and no mask at all.

On a CPU compiled kernels take the place of all this for 16-bit types: `kernels.cpu.decode_attention` and
`kernels.cpu.chunk_attention`.

Cost: gather and products read each key and value twice and write it once; on 2 cores 0.30 to 0.32 ms a layer for 16
requests × 200 tokens (bf16, 9/3 heads of 64; 30 layers in turn, so that nothing comes from a cache), nearly half of it
the gather.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from folovllm.worker_proc.attention.backend import AttentionMetadata
from folovllm.worker_proc.host_to_device import upload
from folovllm.worker_proc.kv_tensors import NULL_BLOCK, KVTensors

_MAX_LENGTH_RATIO = 2


class DecodeStep(Protocol):
    """A step's decoding requests in a kernel of one's own."""

    def attend(self, query: torch.Tensor, cache: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
        """[R, Hq, D] and `KVTensors.layer` → [R, Hq · D], in `output` if given; the new K and V are in the cache."""
        ...


class DecodeKernel(Protocol):
    """See `kernels.cpu.decode_attention.DecodeAttention`."""

    def plan(self, block_table: torch.Tensor, seq_lens: Sequence[int], cache: torch.Tensor) -> DecodeStep:
        """What all layers of a step share."""
        ...


class ChunkStep(Protocol):
    """A step's chunks in a kernel of one's own."""

    def attend(self, query: torch.Tensor, cache: torch.Tensor, output: torch.Tensor) -> None:
        """[T, Hq, D] and `KVTensors.layer`; fills the chunks' rows of `output` [T, Hq · D]."""
        ...


class ChunkKernel(Protocol):
    """See `kernels.cpu.chunk_attention.ChunkAttention`."""

    def plan(self, metadata: AttentionMetadata, cache: torch.Tensor) -> ChunkStep:
        """What all layers of a step share."""
        ...


class PagedBackend:
    """Fast on the CPU, and runs on CUDA with the same operators."""

    name = "paged"

    def __init__(
        self,
        num_q_heads: int,
        decode_kernel: Callable[[], DecodeKernel | None] = lambda: None,
        chunk_kernel: Callable[[], ChunkKernel | None] = lambda: None,
    ) -> None:
        """The kernels: give what decoding requests and chunks go through, or None: then torch's operators do it."""
        self._num_q_heads = num_q_heads
        self._decode_kernel = decode_kernel
        self._chunk_kernel = chunk_kernel

    def begin_step(self, kv: KVTensors, metadata: AttentionMetadata) -> "PagedStep":
        return PagedStep(kv, metadata, self._num_q_heads, self._decode_kernel(), self._chunk_kernel())


@dataclasses.dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Decoding requests of similar length.

    Attributes:
        requests: [N] rows of the step; None for all decoding requests in order.
        num_requests: N.
        rows: [2 · Hkv · N · blocks] rows of the cache to gather.
        bias: [Hkv · N, G, S] added to the scores: 0, or -inf past a request's end.
    """

    requests: torch.Tensor | None
    num_requests: int
    rows: torch.Tensor
    bias: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Chunk:
    """Several new tokens of one request.

    Attributes:
        start, end: its tokens in the step.
        seq_len: its context and these tokens.
        rows: [2 · Hkv · blocks] rows of the cache to gather; None if there is no context before the chunk.
        mask: [1, 1, end - start, seq_len] True where a token may look; None if there is no context before the chunk.
    """

    start: int
    end: int
    seq_len: int
    rows: torch.Tensor | None
    mask: torch.Tensor | None


class PagedStep:
    """See `backend.AttentionStep`."""

    def __init__(
        self,
        kv: KVTensors,
        metadata: AttentionMetadata,
        num_q_heads: int,
        decode_kernel: DecodeKernel | None,
        chunk_kernel: ChunkKernel | None,
    ) -> None:
        self._kv = kv
        self._group_size = num_q_heads // kv.num_kv_heads
        self._num_decodes = metadata.num_decodes
        _zero_new_ends(kv, metadata)
        self._write_rows = kv.token_row_ids(metadata.slot_mapping)
        self._decode_step: DecodeStep | None = None
        self._decode_groups: list[_DecodeGroup] = []
        if decode_kernel is not None and self._num_decodes:
            decodes = slice(0, self._num_decodes)
            table = metadata.block_table[decodes]
            self._decode_step = decode_kernel.plan(table, metadata.seq_lens[decodes], kv.layer(0))
        else:
            self._decode_groups = self._plan_decodes(metadata)
        self._has_chunks = self._num_decodes < len(metadata.query_lens)
        self._chunk_step: ChunkStep | None = None
        self._chunks: list[_Chunk] = []
        if chunk_kernel is not None and self._has_chunks:
            self._chunk_step = chunk_kernel.plan(metadata, kv.layer(0))
        else:
            self._chunks = self._plan_chunks(metadata)
        self._scale = 1 / math.sqrt(kv.head_dim)

    def attend(self, layer: int, query: torch.Tensor, key_and_value: torch.Tensor) -> torch.Tensor:
        self._kv.token_rows(layer).index_copy_(0, self._write_rows, key_and_value.reshape(-1, self._kv.head_dim))
        if not self._has_chunks and self._decode_step is not None:
            return self._decode_step.attend(query, self._kv.layer(layer))
        if not self._has_chunks and len(self._decode_groups) == 1:
            return self._decode(layer, query, self._decode_groups[0])
        output = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        if self._decode_step is not None:
            decodes = slice(0, self._num_decodes)
            self._decode_step.attend(query[decodes], self._kv.layer(layer), output[decodes])
        for group in self._decode_groups:
            if group.requests is None:
                output[: self._num_decodes] = self._decode(layer, query[: self._num_decodes], group)
            else:
                selected = query.index_select(0, group.requests)
                output.index_copy_(0, group.requests, self._decode(layer, selected, group))
        if self._chunk_step is not None:
            self._chunk_step.attend(query, self._kv.layer(layer), output)
        for chunk in self._chunks:
            tokens = slice(chunk.start, chunk.end)
            output[tokens] = self._attend_chunk(layer, query[tokens], key_and_value[tokens], chunk)
        return output

    def _decode(self, layer: int, query: torch.Tensor, group: _DecodeGroup) -> torch.Tensor:
        """[N, Hq, D] → [N, Hq · D]."""
        num_heads, size, head_dim = self._kv.num_kv_heads, self._group_size, self._kv.head_dim
        batch = num_heads * group.num_requests
        gathered = self._kv.block_rows(layer).index_select(0, group.rows)
        keys, values = gathered.view(2, batch, -1, head_dim)
        heads = query.unflatten(1, (num_heads, size)).transpose(0, 1).reshape(batch, size, head_dim)
        scores = torch.baddbmm(group.bias, heads, keys.transpose(1, 2), alpha=self._scale)
        output = torch.bmm(scores.softmax(dim=-1), values)
        return output.view(num_heads, group.num_requests, size * head_dim).transpose(0, 1).flatten(1)

    def _attend_chunk(
        self, layer: int, query: torch.Tensor, key_and_value: torch.Tensor, chunk: _Chunk
    ) -> torch.Tensor:
        """[n, Hq, D] and the chunk's own [n, 2 · Hkv, D] → [n, Hq · D]."""
        num_heads, size = self._kv.num_kv_heads, self._group_size
        if chunk.rows is None:
            heads = key_and_value.transpose(0, 1)  # [2 · Hkv, n, D]
        else:
            gathered = self._kv.block_rows(layer).index_select(0, chunk.rows)
            heads = gathered.view(2 * num_heads, -1, self._kv.head_dim)[:, : chunk.seq_len]
        shared = heads.unsqueeze(1).expand(-1, size, -1, -1)  # the group's heads: stride 0, no copy
        grouped = query.unflatten(1, (num_heads, size)).permute(1, 2, 0, 3)  # [Hkv, G, n, D]
        output = F.scaled_dot_product_attention(
            grouped, shared[:num_heads], shared[num_heads:], attn_mask=chunk.mask, is_causal=chunk.mask is None
        )
        return output.permute(2, 0, 1, 3).flatten(1)

    def _plan_decodes(self, metadata: AttentionMetadata) -> list[_DecodeGroup]:
        if metadata.num_decodes == 0:
            return []
        groups = similar_lengths(metadata.seq_lens[: metadata.num_decodes])
        if len(groups) == 1:
            everyone = slice(0, metadata.num_decodes)
            return [self._decode_group(metadata, everyone, None, max(metadata.seq_lens[everyone]))]
        planned = []
        for members in groups:
            requests = torch.tensor(members, device=metadata.block_table.device)
            planned.append(self._decode_group(metadata, requests, requests, metadata.seq_lens[members[0]]))
        return planned

    def _decode_group(
        self, metadata: AttentionMetadata, members: slice | torch.Tensor, requests: torch.Tensor | None, longest: int
    ) -> _DecodeGroup:
        kv = self._kv
        num_blocks = -(-longest // kv.block_size)
        lengths = metadata.seq_lens_device[members]
        outside = torch.arange(num_blocks * kv.block_size, device=lengths.device) >= lengths[:, None]  # [N, S]
        blocks = metadata.block_table[members, :num_blocks].masked_fill(outside[:, :: kv.block_size], NULL_BLOCK)
        bias = torch.zeros(outside.shape, dtype=kv.data.dtype, device=blocks.device).masked_fill_(outside, -math.inf)
        spread = bias[None, :, None].expand(kv.num_kv_heads, -1, self._group_size, -1).flatten(0, 1)
        return _DecodeGroup(requests, blocks.shape[0], kv.block_row_ids(blocks), spread)

    def _plan_chunks(self, metadata: AttentionMetadata) -> list[_Chunk]:
        chunks = []
        start = metadata.num_decodes
        for request in range(metadata.num_decodes, len(metadata.query_lens)):
            end, seq_len = start + metadata.query_lens[request], metadata.seq_lens[request]
            rows, mask = None, None
            if end - start < seq_len:
                rows, mask = self._chunk_context(metadata.block_table[request], end - start, seq_len)
            chunks.append(_Chunk(start, end, seq_len, rows, mask))
            start = end
        return chunks

    def _chunk_context(
        self, block_ids: torch.Tensor, num_queries: int, seq_len: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._kv.block_row_ids(block_ids[: -(-seq_len // self._kv.block_size)])
        positions = torch.arange(seq_len, device=block_ids.device)
        mask = positions[None, :] <= positions[seq_len - num_queries :, None]
        return rows, mask[None, None]


def _zero_new_ends(kv: KVTensors, metadata: AttentionMetadata) -> None:
    """Zeroes each request's last block if this step is the first to write to it and does not fill it."""
    rows, columns = [], []
    for request, (query_len, seq_len) in enumerate(zip(metadata.query_lens, metadata.seq_lens, strict=True)):
        if 0 < seq_len % kv.block_size <= query_len:
            rows.append(request)
            columns.append(seq_len // kv.block_size)
    if rows:
        places = upload(np.array([rows, columns]), metadata.block_table.device)
        kv.zero_blocks(metadata.block_table[places[0], places[1]])


def similar_lengths(seq_lens: list[int]) -> list[list[int]]:
    """Splits requests into groups whose longest is at most twice their shortest; longest first, order kept on ties.

    One group, when possible, is every request in its given order: then nothing has to be permuted.
    """
    if max(seq_lens) <= _MAX_LENGTH_RATIO * min(seq_lens):
        return [list(range(len(seq_lens)))]
    groups: list[list[int]] = []
    for request in sorted(range(len(seq_lens)), key=lambda row: -seq_lens[row]):
        if groups and seq_lens[groups[-1][0]] <= _MAX_LENGTH_RATIO * seq_lens[request]:
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups

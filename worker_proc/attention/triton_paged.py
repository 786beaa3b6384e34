"""Attention from the blocks with Triton kernels: nothing is gathered, copied or padded.

Decoding requests go through `kernels.triton.paged_decode`, chunks through `paged_prefill`; both read K and V where they
lie, through the block table.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from folovllm.worker_proc.attention.backend import AttentionMetadata
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.host_to_device import upload
from folovllm.worker_proc.kernels.triton.cache_write import CacheLayer, write_to_cache
from folovllm.worker_proc.kernels.triton.key_parts import PartScratch
from folovllm.worker_proc.kernels.triton.paged_decode import DecodeRequests, paged_decode
from folovllm.worker_proc.kernels.triton.paged_prefill import paged_prefill, plan_tiles, rows_per_tile, split_tiles
from folovllm.worker_proc.kv_tensors import KVTensors

_MAX_PARTS = 2048  # of all decoding requests of a step together
_REQUESTS = (16, 64, 256, 512)  # decoding ones: these have the same parts as fewer
_MAX_TOKENS_SPLIT = 512  # of chunks; with more there are tiles enough
_PROGRAMS = 128  # that the parts of tiles and the KV heads make: about one for each multiprocessor


@dataclasses.dataclass(frozen=True, slots=True)
class HeadCounts:
    """Query heads, KV heads, and the size of one."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int


class TritonPagedBackend:
    """Fast on CUDA. Under Triton's interpreter it runs on the CPU too, for tests."""

    name = "triton_paged"

    def __init__(self, heads: HeadCounts, placement: Placement) -> None:
        self._heads = heads
        self._dtype = placement.dtype
        self._group = 1 << (heads.num_q_heads // heads.num_kv_heads - 1).bit_length()
        self._dependent = placement.dependent_launch
        num_rows = max(_MAX_PARTS * heads.num_q_heads, _PROGRAMS * self.tile_sizes(_MAX_TOKENS_SPLIT)[0])
        self._scratch = PartScratch(num_rows, heads.head_dim, _MAX_PARTS * heads.num_kv_heads, placement.device)

    def begin_step(self, kv: KVTensors, metadata: AttentionMetadata) -> "TritonPagedStep":
        decodes = self._decodes(metadata) if metadata.num_decodes else None
        chunks = self._chunks(metadata) if metadata.num_decodes < len(metadata.query_lens) else None
        return TritonPagedStep(kv, self._scratch, decodes, chunks, dependent=self._dependent)

    def begin_decode(
        self,
        kv: KVTensors,
        slots: torch.Tensor,
        seq_lens: torch.Tensor,
        block_tables: torch.Tensor,
        parts: tuple[int, int],
    ) -> "TritonPagedStep":
        """A step of decodes alone that is told everything on the device, as a captured graph needs it.

        Args:
            kv: the cache.
            slots: int64 [R]; each request's row of `block_tables`; below 0 for padding.
            seq_lens: int64 [R]; tokens with the new one; 0 for padding.
            block_tables: int64 [num_slots, blocks].
            parts: most parts of a request and fewest keys of one, see `choose_parts`.
        """
        decodes = DecodeRequests(block_tables, slots, seq_lens, *parts)
        return TritonPagedStep(kv, self._scratch, decodes, None, dependent=self._dependent)

    def begin_padded(
        self,
        kv: KVTensors,
        block_tables: torch.Tensor,
        decodes: tuple[torch.Tensor, torch.Tensor, tuple[int, int]],
        chunks: tuple[torch.Tensor, torch.Tensor, int],
    ) -> "TritonPagedStep":
        """A step of decodes and chunks that is told everything on the device.

        Args:
            kv, block_tables: as for `begin_decode`.
            decodes: slots, lengths and parts, as for `begin_decode`; there may be none.
            chunks: tiles whose rows are slots; int64 [T] places in the cache, below 0 for padding; the first token that
                belongs to a chunk.
        """
        slots, seq_lens, parts = decodes
        tiles, places, first_token = chunks
        requests = DecodeRequests(block_tables, slots, seq_lens, *parts) if len(slots) else None
        tile_rows, _ = self.tile_sizes(len(places) - first_token)
        split = self.tile_parts(len(places) - first_token) > 1
        planned = _Chunks(block_tables, tiles, tile_rows, split, places, first_token)
        return TritonPagedStep(kv, self._scratch, requests, planned, dependent=self._dependent)

    def begin_prompt(self, kv: KVTensors, places: torch.Tensor) -> "PromptStep":
        """A step that is one prompt from its first token on: nothing is read from the cache. `places`: int64 [T]."""
        return PromptStep(kv, places)

    def tile_sizes(self, num_tokens: int) -> tuple[int, int]:
        """Rows and tokens of a tile where chunks have so many tokens together."""
        rows = rows_per_tile(self._heads.head_dim, self._dtype, num_tokens)
        return rows, rows // self._group

    def plan_tiles(
        self,
        lens: tuple[list[int], list[int]],
        table_rows: npt.NDArray[np.int64],
        first_token: int,
        num_tokens: int,
    ) -> npt.NDArray[np.int32]:
        """The tiles of a step's chunks, those of long contexts in parts if there are few.

        Args:
            lens: query_lens and seq_lens, as for `paged_prefill.plan_tiles`, as are `table_rows` and `first_token`.
            num_tokens: that the step has room for.
        """
        tiles = plan_tiles(*lens, table_rows, first_token, self.tile_sizes(num_tokens)[1])
        return split_tiles(tiles, self.tile_parts(num_tokens))

    def tile_parts(self, num_tokens: int) -> int:
        """By so many entries the list of tiles grows at most where some are split; 0 if none is."""
        return _PROGRAMS // self._heads.num_kv_heads if num_tokens <= _MAX_TOKENS_SPLIT else 0

    def choose_parts(self, num_requests: int, longest: int) -> tuple[int, int]:
        """Most parts a request is split into (a power of two), and the fewest keys of a part (a multiple of 128).

        They are the same for many numbers of requests and lengths: so graphs are few, and a captured step, padded to
        more requests, adds up in the same order as one that is not.
        """
        requests = next((size for size in _REQUESTS if size >= num_requests), num_requests)
        min_part = 128 if requests <= 16 else 512 if requests <= 64 else 1024
        reach = 1024
        while reach < longest:
            reach *= 4
        most = 1 << (max(1, _MAX_PARTS // requests).bit_length() - 1)
        return min(-(-reach // min_part), most), min_part

    def _decodes(self, metadata: AttentionMetadata) -> DecodeRequests:
        count = metadata.num_decodes
        parts = self.choose_parts(count, max(metadata.seq_lens[:count]))
        return DecodeRequests(metadata.block_table, None, metadata.seq_lens_device[:count], *parts)

    def _chunks(self, metadata: AttentionMetadata) -> "_Chunks":
        first = metadata.num_decodes
        rows = np.arange(first, len(metadata.query_lens))
        lens = metadata.query_lens[first:], metadata.seq_lens[first:]
        num_tokens = len(metadata.slot_mapping) - first
        planned = self.plan_tiles(lens, rows, first, num_tokens)
        tiles = upload(planned, metadata.block_table.device)
        split = int(planned[:, 5].max()) > 1
        return _Chunks(metadata.block_table, tiles, self.tile_sizes(num_tokens)[0], split, metadata.slot_mapping, first)


@dataclasses.dataclass(frozen=True, slots=True)
class _Chunks:
    """The requests of a step that compute several tokens.

    Attributes:
        block_table: int64 [R, blocks]; of all requests of the step.
        tiles, tile_rows: see `paged_prefill.plan_tiles` and `rows_per_tile`.
        split: there may be parts of tiles.
        slot_mapping: int64 [T]; of all tokens of the step.
        first_token: tokens before it belong to decoding requests.
    """

    block_table: torch.Tensor
    tiles: torch.Tensor
    tile_rows: int
    split: bool
    slot_mapping: torch.Tensor
    first_token: int


class TritonPagedStep:
    """See `backend.AttentionStep`."""

    def __init__(
        self,
        kv: KVTensors,
        scratch: PartScratch,
        decodes: DecodeRequests | None,
        chunks: _Chunks | None,
        *,
        dependent: bool,
    ) -> None:
        self._kv = kv
        self._scratch = scratch
        self._decodes = decodes
        self._chunks = chunks
        self._dependent = dependent

    def attend(self, layer: int, query: torch.Tensor, key_and_value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        cache, decodes, chunks = (
            CacheLayer(self._kv.layer(layer), self._kv.layer_scales(layer)),
            self._decodes,
            self._chunks,
        )
        if decodes is not None:
            paged_decode(query, key_and_value, cache, decodes, self._scratch, out, dependent=self._dependent)
        if chunks is not None:
            write_to_cache(key_and_value, cache, chunks.slot_mapping, chunks.first_token)
            scratch = self._scratch if chunks.split else None
            paged_prefill(query, cache, chunks.block_table, chunks.tiles, chunks.tile_rows, out, scratch)
        return out


class PromptStep:
    """One prompt, all of it in this step: its keys and values are where the product of q, k and v left them.

    cuDNN's attention takes them as they lie: 430, 570 and 630 TFLOP/s at 1,024, 4,096 and 16,384 tokens (H100, 16 and 8
    heads of 128, bf16), where `paged_prefill` reaches 250, 380 and 440. It plans for each length anew, which takes
    longer than the attention: it is for captured passes, whose length is always the same. Tokens of padding at the end
    are seen by no other token.
    """

    def __init__(self, kv: KVTensors, places: torch.Tensor) -> None:
        self._kv = kv
        self._places = places

    def attend(self, layer: int, query: torch.Tensor, key_and_value: torch.Tensor) -> torch.Tensor:
        write_to_cache(key_and_value, CacheLayer(self._kv.layer(layer)), self._places, 0)
        key, value = key_and_value.split(self._kv.num_kv_heads, dim=1)
        queries, keys, values = (each.transpose(0, 1).unsqueeze(0) for each in (query, key, value))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            output = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return output[0].transpose(0, 1).flatten(1)

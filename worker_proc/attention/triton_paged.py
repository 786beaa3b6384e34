"""Attention from the blocks with Triton kernels: nothing is gathered, copied or padded.

Decoding requests go through `kernels.triton.paged_decode`, chunks through `paged_prefill`; both read K and V where they
lie, through the block table.
"""

import dataclasses

import torch

from folovllm.worker_proc.attention.backend import AttentionMetadata
from folovllm.worker_proc.host_to_device import upload
from folovllm.worker_proc.kernels.triton.cache_write import write_to_cache
from folovllm.worker_proc.kernels.triton.paged_decode import DecodeRequests, DecodeScratch, paged_decode
from folovllm.worker_proc.kernels.triton.paged_prefill import paged_prefill, plan_tiles
from folovllm.worker_proc.kv_tensors import KVTensors

_MAX_PARTS = 2048  # of all decoding requests of a step together


@dataclasses.dataclass(frozen=True, slots=True)
class HeadCounts:
    """Query heads, KV heads, and the size of one."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int


class TritonPagedBackend:
    """Fast on CUDA. Under Triton's interpreter it runs on the CPU too, for tests."""

    name = "triton_paged"

    def __init__(self, heads: HeadCounts, device: torch.device, *, dependent_launch: bool) -> None:
        """`dependent_launch`: overlap a kernel's start with the end of the one before (CUDA, compute capability 9)."""
        self._heads = heads
        self._dependent = dependent_launch
        self._scratch = DecodeScratch(_MAX_PARTS, dataclasses.astuple(heads), device)

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

    def choose_parts(self, num_requests: int, longest: int) -> tuple[int, int]:
        """Most parts a request is split into (a power of two), and the fewest keys of a part (a multiple of 64)."""
        min_part = 64 if num_requests <= 4 else 128 if num_requests <= 16 else 256 if num_requests <= 64 else 512
        room = max(1, _MAX_PARTS // num_requests)
        wanted = min(-(-longest // min_part), room)
        return 1 << (wanted - 1).bit_length() if wanted * 2 <= room else 1 << (wanted.bit_length() - 1), min_part

    def _decodes(self, metadata: AttentionMetadata) -> DecodeRequests:
        count = metadata.num_decodes
        parts = self.choose_parts(count, max(metadata.seq_lens[:count]))
        return DecodeRequests(metadata.block_table, None, metadata.seq_lens_device[:count], *parts)

    def _chunks(self, metadata: AttentionMetadata) -> "_Chunks":
        first = metadata.num_decodes
        group = self._heads.num_q_heads // self._heads.num_kv_heads
        tiles = plan_tiles(metadata.query_lens[first:], metadata.seq_lens[first:], first, first, group)
        return _Chunks(metadata.block_table, upload(tiles, metadata.block_table.device), metadata.slot_mapping, first)


@dataclasses.dataclass(frozen=True, slots=True)
class _Chunks:
    """The requests of a step that compute several tokens.

    Attributes:
        block_table: int64 [R, blocks]; of all requests of the step.
        tiles: see `paged_prefill.plan_tiles`.
        slot_mapping: int64 [T]; of all tokens of the step.
        first_token: tokens before it belong to decoding requests.
    """

    block_table: torch.Tensor
    tiles: torch.Tensor
    slot_mapping: torch.Tensor
    first_token: int


class TritonPagedStep:
    """See `backend.AttentionStep`."""

    def __init__(
        self,
        kv: KVTensors,
        scratch: DecodeScratch,
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
        kv_layer, decodes, chunks = self._kv.layer(layer), self._decodes, self._chunks
        if decodes is not None:
            paged_decode(query, key_and_value, kv_layer, decodes, self._scratch, out, dependent=self._dependent)
        if chunks is not None:
            write_to_cache(key_and_value, kv_layer, chunks.slot_mapping, chunks.first_token)
            paged_prefill(query, kv_layer, chunks.block_table, chunks.tiles, out)
        return out

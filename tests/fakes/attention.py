"""Requests over a paged cache, reduced to what attention and networks need: builds AttentionMetadata for tests."""

import dataclasses
from collections.abc import Sequence

import torch

from folovllm.common.model_config import ModelConfig, RopeConfig
from folovllm.worker_proc.attention.backend import AttentionMetadata

_CPU = torch.device("cpu")


@dataclasses.dataclass
class PagedRequest:
    """A request in a test: the blocks it owns and how many tokens are in the cache."""

    blocks: list[int]
    num_computed: int = 0


def scattered_blocks(lengths: Sequence[int], block_size: int, seed: int = 0) -> tuple[list[list[int]], int]:
    """Blocks for requests of these lengths, in random order, block 0 left out; and the number of blocks in the pool."""
    counts = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)) + 1
    ids = order.tolist()
    return [[ids.pop() for _ in range(count)] for count in counts], sum(counts) + 1


def model_config(num_kv_heads: int, head_dim: int) -> ModelConfig:
    """What a cache of two layers needs to know."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=10,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=num_kv_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope=RopeConfig(),
        max_position_embeddings=64,
    )


def build_metadata(
    requests: Sequence[PagedRequest], query_lens: Sequence[int], block_size: int, device: torch.device = _CPU
) -> AttentionMetadata:
    """Metadata of a step in which each request computes its next `query_lens` tokens; rows of one token come first."""
    seq_lens = [request.num_computed + length for request, length in zip(requests, query_lens, strict=True)]
    slots = [
        request.blocks[position // block_size] * block_size + position % block_size
        for request, seq_len in zip(requests, seq_lens, strict=True)
        for position in range(request.num_computed, seq_len)
    ]
    num_decodes = next((row for row, length in enumerate(query_lens) if length != 1), len(query_lens))
    width = max(len(request.blocks) for request in requests)
    table = [request.blocks + [0] * (width - len(request.blocks)) for request in requests]
    return AttentionMetadata(
        query_lens=list(query_lens),
        seq_lens=seq_lens,
        num_decodes=num_decodes,
        block_table=torch.tensor(table, device=device),
        slot_mapping=torch.tensor(slots, device=device),
        seq_lens_device=torch.tensor(seq_lens, device=device),
    )


def positions_of(requests: Sequence[PagedRequest], query_lens: Sequence[int]) -> torch.Tensor:
    """Positions [T] of the tokens that `build_metadata` describes."""
    spans = [
        torch.arange(request.num_computed, request.num_computed + length)
        for request, length in zip(requests, query_lens, strict=True)
    ]
    return torch.cat(spans)

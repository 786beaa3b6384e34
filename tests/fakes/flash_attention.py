"""What FlashAttention's packages compute, in plain torch, with their signatures and their checks of the arguments.

The two functions stand for those of the same names in the modules `flash_attn` (version 2) and `flash_attn_interface`
(version 3). Arguments that the engine does not give have no place here, so that giving one fails.
"""

import torch


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    assert cu_seqlens_k.dtype == torch.int32 and cu_seqlens_k.is_contiguous()
    seq_lens = cu_seqlens_k.diff()
    assert max_seqlen_k == int(seq_lens.max())
    return _attend(q, k, v, cu_seqlens_q, seq_lens, max_seqlen_q, block_table, softmax_scale, causal)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    assert cache_seqlens is not None and cu_seqlens_q is not None and max_seqlen_q is not None
    assert cache_seqlens.dtype == torch.int32 and cache_seqlens.is_contiguous()
    return _attend(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, max_seqlen_q, page_table, softmax_scale, causal)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_ends: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    block_table: torch.Tensor | None,
    scale: float | None,
    causal: bool,
) -> torch.Tensor:
    num_requests, group = len(seq_lens), q.shape[1] // k.shape[2]
    assert block_table is not None and block_table.dtype == torch.int32 and block_table.stride(-1) == 1
    assert query_ends.dtype == torch.int32 and query_ends.is_contiguous() and query_ends.shape == (num_requests + 1,)
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v)) and block_table.shape[0] == num_requests
    ends = query_ends.tolist()
    assert ends[0] == 0 and ends[-1] == q.shape[0] and max_query_len == int(query_ends.diff().max())
    output = torch.empty_like(q)
    for request, seq_len in enumerate(seq_lens.tolist()):
        queries = slice(ends[request], ends[request + 1])
        blocks = block_table[request, : -(-seq_len // k.shape[1])].long()
        keys, values = (
            cache[blocks].flatten(0, 1)[:seq_len].repeat_interleave(group, dim=1).float() for cache in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", q[queries].float(), keys) * (scale or q.shape[-1] ** -0.5)
        if causal:  # the last query sees the last key
            count = ends[request + 1] - ends[request]
            hidden = torch.ones(count, seq_len, dtype=torch.bool).tril(seq_len - count).logical_not()
            scores = scores.masked_fill(hidden, -torch.inf)
        output[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)
    return output

"""Causal attention of chunks of new tokens over a paged cache that already holds their K and V.

Prior art: FlashAttention 2 (Dao 2023): a tile of queries stays on the chip, keys and values stream past it, and the
softmax is rescaled as larger scores appear. Chunks of several requests share one launch: a list of tiles says which
request and which tokens each program has, so no request is padded to another's length. The query heads of a KV head
are rows of the same tile, so that keys are loaded once for all of them.

A few tokens over a long context are too few tiles for the chip: 16 tokens over 4,080 keys were 8 programs of 130 µs (16
and 8 heads of 128, H200). There the keys of a tile are split as in flash decoding: `split_tiles` lists a tile once for
each part, in places of the list that would be padding otherwise, and the last part to finish joins them.

Reference: `attention.torch_naive`.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from folovllm.worker_proc.kernels.triton.cache_write import CacheLayer, for_products
from folovllm.worker_proc.kernels.triton.key_parts import PartScratch, join_parts, leave_part

_LOG2_E = math.log2(math.e)
_MANY_TOKENS = 8192
_MIN_PART = 256  # keys; each part is written, read and joined besides
_PART_STEP = 64  # a multiple of every TILE
_STAGES_OF_PARTS = 5  # the few turns of a part wait for memory, so more of it is under way
_JOIN_ROWS = 32  # that are joined at a time: what four parts have of them fits into registers
FIELDS = 8  # numbers that describe a tile, or a part of one


def rows_per_tile(head_dim: int, dtype: torch.dtype, num_tokens: int) -> int:
    """Query rows of a tile: tokens times heads of a group, padded to a power of two.

    As much as registers hold, but small enough for `num_tokens` to give every multiprocessor some tiles.
    """
    if dtype == torch.float32 or head_dim > 128:
        return 64
    return 256 if num_tokens >= _MANY_TOKENS else 128


def plan_tiles(
    query_lens: list[int], seq_lens: list[int], table_rows: npt.NDArray[np.int64], first_token: int, tokens: int
) -> npt.NDArray[np.int32]:
    """The tiles of a step's chunks, int32 [n, 8]: row of the block table, first token, its position, tokens; one part.

    Args:
        query_lens, seq_lens: of the requests that compute chunks; as in `AttentionMetadata`.
        table_rows: each one's row of the block table.
        first_token: the first one's first token in the step; the others follow.
        tokens: most tokens of a tile.

    Those with the longest context come first, so that no long one is left running alone at the end.
    """
    tiles = []
    for row, query_len, seq_len in zip(table_rows.tolist(), query_lens, seq_lens, strict=True):
        starts = np.arange(0, query_len, tokens)
        tile = np.zeros((len(starts), FIELDS), np.int32)
        tile[:, 0] = row
        tile[:, 1] = first_token + starts
        tile[:, 2] = seq_len - query_len + starts
        tile[:, 3] = np.minimum(query_len - starts, tokens)
        tile[:, 5] = 1
        tile[:, 6] = seq_len
        tiles.append(tile)
        first_token += query_len
    planned = np.concatenate(tiles)
    return np.ascontiguousarray(planned[np.argsort(-planned[:, 2], kind="stable")])


def split_tiles(tiles: npt.NDArray[np.int32], most: int) -> npt.NDArray[np.int32]:
    """Lists tiles of long contexts once for each part that their keys are split into.

    Args:
        tiles: of `plan_tiles`.
        most: at most so many parts, not counting tiles that stay whole; the list grows by less.

    Returns:
        int32 [m, 8]: as before, and part, parts of the tile, keys of a part, parts of other tiles before these.
    """
    lengths = tiles[:, 2] + tiles[:, 3]
    fewest = max(_MIN_PART, -(-int(lengths.sum()) // max(most, 1)))
    parts = np.maximum(lengths // fewest, 1)
    if parts.max() == 1:
        return tiles
    keys = -(-lengths // (parts * _PART_STEP)) * _PART_STEP
    parts = -(-lengths // keys)  # parts rounded up may be fewer
    shared = np.where(parts > 1, parts, 0)
    split = np.repeat(tiles, parts, axis=0)
    split[:, 4] = np.arange(len(split)) - np.repeat(np.cumsum(parts) - parts, parts)
    split[:, 5], split[:, 6] = np.repeat(parts, parts), np.repeat(keys, parts)
    split[:, 7] = np.repeat(np.cumsum(shared) - shared, parts)
    return split


def paged_prefill(
    query: torch.Tensor,
    cache: CacheLayer,
    block_table: torch.Tensor,
    tiles: torch.Tensor,
    rows: int,
    out: torch.Tensor,
    scratch: PartScratch | None,
) -> None:
    """Writes the attention of every token of `tiles` to `out`.

    Args:
        query: [T, Hq, head_dim]; a head is contiguous.
        cache: of the layer; the chunks' own K and V are in it.
        block_table: int64 [R, blocks], row-major.
        tiles: int32 [n, 8], see `plan_tiles` and `split_tiles`; a tile of 0 tokens is passed over.
        rows: of a tile, see `rows_per_tile`.
        out: [T, Hq · head_dim], contiguous.
        scratch: where tiles may be split; Hkv · `rows` rows and Hkv counters for each part. None: no tile is.
    """
    _, num_q_heads, head_dim = query.shape
    _, num_kv_heads, num_blocks, block_size, _ = cache.data.shape
    group = num_q_heads // num_kv_heads
    padded = triton.next_power_of_2(head_dim)
    wide = query.dtype == torch.float32
    _paged_prefill[(num_kv_heads, tiles.shape[0])](
        query,
        *cache.pointers,
        block_table,
        tiles,
        out,
        *((out, out, out) if scratch is None else (scratch.outputs, scratch.log_sums, scratch.num_done)),
        _LOG2_E / math.sqrt(head_dim),
        query.stride(0),
        block_table.stride(0),
        num_kv_heads * num_blocks * block_size * head_dim,
        num_blocks * block_size * head_dim,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_ROWS=triton.next_power_of_2(group),
        ROWS=rows,
        HEAD_DIM=head_dim,
        PADDED=padded,
        BLOCK_SIZE=block_size,
        FP8=cache.scales is not None,
        TILE=32 if wide or padded > 128 else 64,
        SPLIT=scratch is not None,
        JOIN_ROWS=_JOIN_ROWS,
        num_warps=8 if padded > 64 and not wide else 4,
        num_stages=2 if wide or padded > 128 else 3 if scratch is None else _STAGES_OF_PARTS,
    )


@triton.jit
def _paged_prefill(
    query_ptr,
    kv_ptr,
    scales_ptr,
    table_ptr,
    tiles_ptr,
    out_ptr,
    outputs_ptr,
    log_sums_ptr,
    done_ptr,
    scale,
    query_stride,
    table_stride,
    value_offset,
    head_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FP8: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    JOIN_ROWS: tl.constexpr,
):
    head = tl.program_id(0)
    tile = tiles_ptr + tl.program_id(1) * 8
    table = table_ptr + tl.load(tile).to(tl.int64) * table_stride
    first_token = tl.load(tile + 1).to(tl.int64)
    first_position = tl.load(tile + 2)
    num_tokens = tl.load(tile + 3)
    if num_tokens == 0:
        return
    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    token, member = row // GROUP_ROWS, row % GROUP_ROWS
    in_head = column < HEAD_DIM
    in_tile = ((token < num_tokens) & (member < GROUP))[:, None] & in_head[None, :]
    in_token = (head * GROUP + member)[:, None] * HEAD_DIM + column[None, :]
    at_query = (first_token + token)[:, None] * query_stride + in_token
    query = for_products(tl.load(query_ptr + at_query, mask=in_tile, other=0.0), FP8)
    keys = kv_ptr + head.to(tl.int64) * head_stride
    largest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    value_scale = 1.0
    if FP8:  # scores and output are multiplied instead of each key and value
        scale *= tl.load(scales_ptr + head)
        value_scale = tl.load(scales_ptr + NUM_KV_HEADS + head)
    seq_len = first_position + num_tokens
    last_seen = first_position + token
    whole = ((first_position + 1) // TILE) * TILE  # keys before this are seen by every query of the tile
    start, end = 0, seq_len
    if SPLIT:
        part, num_parts, part_len = tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6)
        start = part * part_len
        end = tl.minimum(end, start + part_len)
        whole = tl.maximum(tl.minimum(whole, end), start)
    acc, total, largest = _attend(
        acc, total, largest, query, keys, table, last_seen, scale, value_offset, start, whole,
        HEAD_DIM, PADDED, BLOCK_SIZE, TILE, False,
    )  # fmt: skip
    acc, total, largest = _attend(
        acc, total, largest, query, keys, table, last_seen, scale, value_offset, whole, end,
        HEAD_DIM, PADDED, BLOCK_SIZE, TILE, True,
    )  # fmt: skip
    at_out = (first_token + token)[:, None] * (NUM_KV_HEADS * GROUP * HEAD_DIM) + in_token
    result = acc / total[:, None] * value_scale
    if SPLIT and num_parts > 1:
        place, num_rows = tl.load(tile + 7) * NUM_KV_HEADS, num_tokens * GROUP_ROWS
        base, counter = (place + head * num_parts) * ROWS, done_ptr + place + head
        if leave_part(
            result, largest + tl.log2(total), outputs_ptr, log_sums_ptr, counter, base + part * ROWS, num_parts,
            num_rows, ROWS, HEAD_DIM, PADDED,
        ):  # fmt: skip
            for first in range(0, num_rows, JOIN_ROWS):
                joined = join_parts(
                    outputs_ptr, log_sums_ptr, base + first, num_parts, num_rows - first, ROWS, JOIN_ROWS,
                    HEAD_DIM, PADDED,
                )  # fmt: skip
                row_joined = first + tl.arange(0, JOIN_ROWS)
                token_joined, member_joined = row_joined // GROUP_ROWS, row_joined % GROUP_ROWS
                counts = (row_joined < num_rows) & (member_joined < GROUP)
                at_joined = (first_token + token_joined)[:, None] * (NUM_KV_HEADS * GROUP * HEAD_DIM) + column[None, :]
                at_joined += (head * GROUP + member_joined)[:, None] * HEAD_DIM
                in_joined = counts[:, None] & in_head[None, :]
                tl.store(out_ptr + at_joined, joined.to(out_ptr.dtype.element_ty), mask=in_joined)
            tl.store(counter, 0)
    else:
        tl.store(out_ptr + at_out, result.to(out_ptr.dtype.element_ty), mask=in_tile)


@triton.jit
def _attend(
    acc,
    total,
    largest,
    query,
    keys,
    table,
    last_seen,
    scale,
    value_offset,
    start,
    end,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Goes on with the keys `start` to `end`; MASKED: some of them lie after some of the queries, or after the end."""
    key_index, column = tl.arange(0, TILE), tl.arange(0, PADDED)
    in_head = column < HEAD_DIM
    for first in range(start, end, TILE):
        position = first + key_index
        known = position < end
        block = tl.load(table + position // BLOCK_SIZE, mask=known, other=0)
        place = (block * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD_DIM
        at_key = keys + place[None, :] + column[:, None]
        at_value = keys + value_offset + place[:, None] + column[None, :]
        if MASKED or PADDED != HEAD_DIM:
            key = tl.load(at_key, mask=known[None, :] & in_head[:, None], other=0.0)
            value = tl.load(at_value, mask=known[:, None] & in_head[None, :], other=0.0)
        else:
            key = tl.load(at_key)
            value = tl.load(at_value)
        scores = tl.dot(query, key.to(query.dtype), input_precision="ieee") * scale
        if MASKED:
            scores = tl.where(position[None, :] <= last_seen[:, None], scores, -1e30)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - new_largest)
        weights = tl.exp2(scores - new_largest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        largest = new_largest
        acc = tl.dot(weights.to(query.dtype), value.to(query.dtype), acc * shrink[:, None], input_precision="ieee")
    return acc, total, largest

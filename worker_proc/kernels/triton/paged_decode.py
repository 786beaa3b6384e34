"""Attention of one new token per request over a paged cache, which also writes that token's K and V.

Prior art: flash decoding (Dao and others 2023: keys split over programs, partial results joined by their log-sum-exp)
and packed query groups: the query heads of a KV head are the rows of one product, so that each key is read once.

One program is one (request, KV head, part). The new token's key and value come straight from the activations; the last
part writes them to the cache, and no other part reads their place. A request uses as many parts as its length is worth
(`min_part` keys each), whatever the grid has room for; the program that finishes last joins them, so there is no second
kernel. Memory read is the bound: on an H100 it runs at 2.8 to 3.0 TB/s from 64 requests of 256 tokens on.

With an FP8 cache a key has half the bytes, and the instructions that it takes become the bound. So products are in
float16, which the hardware makes of two FP8 numbers at once (bfloat16 takes a detour of two slow conversions more), and
values are loaded in pairs, the even and odd columns of which are two products: tensor cores want neighbouring keys of a
column in a register, and shared memory can be read transposed by 16 bits, not by 8. Instructions a key, counted in the
loop for sm_90: 44 at first, 33 in float16, 23 with pairs.

Reference: `attention.torch_naive`.
"""

import dataclasses
import math

import torch
import triton
import triton.language as tl

from folovllm.worker_proc.kernels.triton.cache_write import CacheLayer, for_products, round_to_fp8
from folovllm.worker_proc.kernels.triton.key_parts import PartScratch, join_parts, leave_part
from folovllm.worker_proc.kernels.triton.pdl import launch_options, wait

_SMALLEST_DOT = 16  # rows of the smallest product on tensor cores
_LOG2_E = math.log2(math.e)
_TILE = 128  # keys of one turn of the loop
_FP8_REGISTERS = 168  # of a thread, for three programs on a multiprocessor instead of two; nothing is spilled
# (k0 d0, k0 d1, k1 d0, k1 d1) → (k0 d0, k1 d0) and (k0 d1, k1 d1)
_UNPACK_PAIRS = tl.constexpr(
    "{ .reg .b32 t; .reg .b16 even, odd; prmt.b32 t, $2, 0, 0x3120; mov.b32 {even, odd}, t;"
    " cvt.rn.f16x2.e4m3x2 $0, even; cvt.rn.f16x2.e4m3x2 $1, odd; }"
)


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeRequests:
    """The decoding requests of a step.

    Attributes:
        block_table: int64, row-major; one row of block ids per request, or per slot if `rows` is given.
        rows: int64 [R]; each request's row of `block_table`; None if they are in order.
        seq_lens: int64 [R]; tokens with the new one; 0 for a row of padding, which reads and writes nothing.
        num_parts: most parts that a request is split into.
        min_part: fewest keys of a part, a multiple of 128.
    """

    block_table: torch.Tensor
    rows: torch.Tensor | None
    seq_lens: torch.Tensor
    num_parts: int
    min_part: int


def paged_decode(
    query: torch.Tensor,
    key_and_value: torch.Tensor,
    cache: CacheLayer,
    requests: DecodeRequests,
    scratch: PartScratch,
    out: torch.Tensor,
    *,
    dependent: bool = False,
) -> None:
    """Writes the new tokens' K and V to the cache and the attention of each to `out`.

    Args:
        query: [≥ R, Hq, head_dim]; the first R tokens count; a head is contiguous.
        key_and_value: [≥ R, 2 · Hkv, head_dim]; as in `AttentionStep.attend`.
        cache: of the layer.
        requests: R decoding requests.
        scratch: R · num_parts · Hq rows and R · Hkv counters at least, if num_parts > 1.
        out: [≥ R, Hq · head_dim], contiguous; rows of padding stay as they are.
        dependent: launched as a dependent of the kernel before, see `pdl`.
    """
    num_requests, num_q_heads, head_dim = requests.seq_lens.shape[0], query.shape[1], query.shape[2]
    _, num_kv_heads, num_blocks, block_size, _ = cache.data.shape
    group = num_q_heads // num_kv_heads
    assert requests.num_parts == 1 or num_requests * requests.num_parts * num_q_heads <= scratch.num_rows
    fp8, small = cache.scales is not None, head_dim <= 128 and query.dtype.itemsize == 2
    _paged_decode[(num_requests, num_kv_heads, requests.num_parts)](
        query,
        key_and_value,
        *cache.pointers,
        cache.data.view(torch.int16) if fp8 else cache.data,
        requests.block_table,
        requests.seq_lens if requests.rows is None else requests.rows,
        requests.seq_lens,
        out,
        scratch.outputs,
        scratch.log_sums,
        scratch.num_done,
        _LOG2_E / math.sqrt(head_dim),
        query.stride(0),
        key_and_value.stride(0),
        requests.block_table.stride(0),
        num_kv_heads * num_blocks * block_size * head_dim,
        num_blocks * block_size * head_dim,
        requests.min_part,
        WITH_ROWS=requests.rows is not None,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        DOT_ROWS=max(_SMALLEST_DOT, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        PADDED=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        TILE=_TILE if small else _TILE // 4,
        FP8=fp8,
        ASSEMBLY=query.is_cuda,
        DEPENDENT=dependent,
        num_warps=4,
        num_stages=5 if fp8 else 2,
        maxnreg=_FP8_REGISTERS if fp8 and small else None,
        **launch_options(dependent),
    )


@triton.jit
def _paged_decode(
    query_ptr,
    new_ptr,
    kv_ptr,
    scales_ptr,
    pairs_ptr,
    table_ptr,
    rows_ptr,
    seq_lens_ptr,
    out_ptr,
    outputs_ptr,
    log_sums_ptr,
    done_ptr,
    scale,
    query_stride,
    new_stride,
    table_stride,
    value_offset,
    head_stride,
    min_part,
    WITH_ROWS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DOT_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    FP8: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    request, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    wait(DEPENDENT)
    seq_len = tl.load(seq_lens_ptr + request).to(tl.int32)
    part_len = tl.maximum(min_part, tl.cdiv(tl.cdiv(seq_len, tl.num_programs(2)), TILE) * TILE)
    num_parts = tl.cdiv(seq_len, part_len)
    if part >= num_parts:
        return
    table_row = tl.load(rows_ptr + request) if WITH_ROWS else request
    table = table_ptr + table_row * table_stride
    row, column, key_index = tl.arange(0, DOT_ROWS), tl.arange(0, PADDED), tl.arange(0, TILE)
    in_head = column < HEAD_DIM
    in_group = (row < GROUP)[:, None] & in_head[None, :]
    in_out = (head * GROUP + row)[:, None] * HEAD_DIM + column[None, :]
    query = tl.load(query_ptr + request * query_stride + in_out, mask=in_group, other=0.0)
    query = for_products(query, FP8)
    keys = kv_ptr + head.to(tl.int64) * head_stride
    values = keys + value_offset
    largest = tl.full([DOT_ROWS], -1e30, tl.float32)
    total = tl.zeros([DOT_ROWS], tl.float32)
    COLUMNS: tl.constexpr = PADDED // 2 if FP8 else PADDED  # FP8: `acc` has the even ones
    acc = tl.zeros([DOT_ROWS, COLUMNS], tl.float32)
    acc_odd = tl.zeros([DOT_ROWS, COLUMNS], tl.float32)
    value_scale = 1.0
    if FP8:  # scores and output are multiplied instead of each key and value
        key_scale, value_scale = tl.load(scales_ptr + head), tl.load(scales_ptr + NUM_KV_HEADS + head)
        scale *= key_scale
    if part == num_parts - 1:  # the new token
        new = new_ptr + request * new_stride + head * HEAD_DIM + column
        new_key = tl.load(new, mask=in_head, other=0.0).to(tl.float32)
        new_value = tl.load(new + NUM_KV_HEADS * HEAD_DIM, mask=in_head, other=0.0).to(tl.float32)
        if FP8:
            new_key, new_value = round_to_fp8(new_key / key_scale), round_to_fp8(new_value / value_scale)
            new_even, new_odd = tl.split(tl.reshape(new_value, [COLUMNS, 2]))
            acc += new_even[None, :]
            acc_odd += new_odd[None, :]
        else:
            acc += new_value[None, :]
        last = seq_len - 1
        place = tl.load(table + last // BLOCK_SIZE) * BLOCK_SIZE + last % BLOCK_SIZE
        tl.store(keys + place * HEAD_DIM + column, new_key.to(kv_ptr.dtype.element_ty), mask=in_head)
        tl.store(values + place * HEAD_DIM + column, new_value.to(kv_ptr.dtype.element_ty), mask=in_head)
        largest = tl.sum(query.to(tl.float32) * new_key[None, :], 1) * scale
        total += 1.0
    value_pairs = pairs_ptr + head.to(tl.int64) * (head_stride // 2) + value_offset // 2
    pair_column = tl.arange(0, PADDED // 2)
    start = part * part_len
    end = tl.minimum(seq_len - 1, start + part_len)
    for first in range(start, end, TILE):
        position = first + key_index
        known = position < end
        block = tl.load(table + position // BLOCK_SIZE, mask=known, other=0)
        token = block * BLOCK_SIZE + position % BLOCK_SIZE
        at_key = token[None, :] * HEAD_DIM + column[:, None]
        key = tl.load(keys + at_key, mask=known[None, :] & in_head[:, None], other=0.0).to(query.dtype)
        scores = tl.where(known[None, :], tl.dot(query, key, input_precision="ieee") * scale, -1e30)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - new_largest)
        weights = tl.exp2(scores - new_largest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        largest = new_largest
        if FP8:
            at_pair = token[:, None] * (HEAD_DIM // 2) + pair_column[None, :]
            in_pairs = known[:, None] & (pair_column < HEAD_DIM // 2)[None, :]
            pairs = tl.load(value_pairs + at_pair, mask=in_pairs, other=0)
            value, odd = _unpack_pairs(pairs, query.dtype, ASSEMBLY)
            acc_odd = tl.dot(weights.to(query.dtype), odd, acc_odd * shrink[:, None], input_precision="ieee")
        else:
            at_value = token[:, None] * HEAD_DIM + column[None, :]
            value = tl.load(values + at_value, mask=known[:, None] & in_head[None, :], other=0.0)
        acc = tl.dot(weights.to(query.dtype), value, acc * shrink[:, None], input_precision="ieee")
    if FP8:
        acc = tl.reshape(tl.join(acc, acc_odd), [DOT_ROWS, PADDED])
    result = acc / total[:, None] * value_scale
    out = out_ptr + request * NUM_KV_HEADS * GROUP * HEAD_DIM + in_out
    if num_parts == 1:
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=in_group)
    else:
        base = (request * NUM_KV_HEADS + head) * tl.num_programs(2) * GROUP
        counter = done_ptr + request * NUM_KV_HEADS + head
        if leave_part(
            result, largest + tl.log2(total), outputs_ptr, log_sums_ptr, counter, base + part * GROUP, num_parts,
            GROUP, DOT_ROWS, HEAD_DIM, PADDED,
        ):  # fmt: skip
            joined = join_parts(outputs_ptr, log_sums_ptr, base, num_parts, GROUP, GROUP, DOT_ROWS, HEAD_DIM, PADDED)
            tl.store(out, joined.to(out_ptr.dtype.element_ty), mask=in_group)
            tl.store(counter, 0)


@triton.jit
def _unpack_pairs(pairs, TYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """int16, each two float8_e4m3fn numbers → the low ones and the high ones, of TYPE. ASSEMBLY: on CUDA."""
    if ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            _UNPACK_PAIRS, "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        low = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        high = ((pairs >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return low.to(TYPE), high.to(TYPE)

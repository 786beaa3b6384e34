"""Sampling for a captured decode step: parameters are read by slot, the token goes to the host's buffer and to its row.

The definition is `sample.sampler`'s, for rows without a filter: greedy rows take the lowest id of the largest logit;
others the token at which the cumulated weights exp((logit - largest) / temperature), in order of ids, first exceed
their sum times the uniform number of `sample.random`. A row is cut into chunks of 2,048 ids: one launch finds each
chunk's largest logit, one its sum of weights (float64), one picks chunk and token. So a row takes part in no other
row's sums and 256 rows of 151,936 logits are read twice, at the speed of memory.
"""

import dataclasses

import torch
import triton
import triton.language as tl

_CHUNK = 2048
_STEP = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
_MULTIPLY_1 = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
_MULTIPLY_2 = tl.constexpr(0x94D049BB133111EB - 2**64)
_MASK_30, _MASK_27, _MASK_31 = tl.constexpr(2**34 - 1), tl.constexpr(2**37 - 1), tl.constexpr(2**33 - 1)
_MASK_52 = tl.constexpr(2**52 - 1)
_ULP = tl.constexpr(2.0**-52)
_GREEDY_TEMPERATURE = tl.constexpr(1e-5)  # common.sampling_params.GREEDY_TEMPERATURE; a test compares them


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingRows:
    """The persistent rows that sampling reads and writes; see `RequestStates`.

    Attributes:
        floats: float64 [num_slots, n]; temperature first.
        integers: int64 [num_slots, n]; top_k, seed, sample_index, prompt length first.
        token_ids: int32 [num_slots, max_model_len]; the token is written to its place.
    """

    floats: torch.Tensor
    integers: torch.Tensor
    token_ids: torch.Tensor


class SamplingScratch:
    """What the launches of one step leave for each other, for up to `rows` rows of `num_columns` logits."""

    def __init__(self, rows: int, num_columns: int, device: torch.device) -> None:
        chunks = triton.cdiv(num_columns, _CHUNK)
        self.largest = torch.empty(rows, chunks, dtype=torch.float32, device=device)
        self.ids = torch.empty(rows, chunks, dtype=torch.int32, device=device)
        self.sums = torch.empty(rows, chunks, dtype=torch.float64, device=device)


def sample_decodes(
    logits: torch.Tensor,
    num_columns: int,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    rows: SamplingRows,
    scratch: SamplingScratch,
    out: torch.Tensor,
    *,
    all_greedy: bool,
) -> None:
    """Draws one token for each request.

    Args:
        logits: [R, ≥ num_columns], any float type; a row is contiguous.
        num_columns: ids that may be drawn are below this.
        slots: int64 [R]; below 0 for padding.
        seq_lens: int64 [R]; tokens known before this one.
        rows: the persistent rows.
        scratch: for R rows at least.
        out: int32 [R]; the tokens; -1 where the largest logit is no finite number.
        all_greedy: every row is; the sums are left out.
    """
    num_rows, chunks = slots.shape[0], triton.cdiv(num_columns, _CHUNK)
    grid, stride = (num_rows, chunks), logits.stride(0)
    partial = (scratch.largest, scratch.ids, scratch.sums)
    _find_largest[grid](logits, *partial[:2], num_columns, stride, chunks, _CHUNK, num_warps=4)
    padded = triton.next_power_of_2(chunks)
    if not all_greedy:
        table = (rows.floats, rows.floats.stride(0))
        _sum_weights[grid](
            logits,
            scratch.largest,
            scratch.sums,
            slots,
            *table,
            num_columns,
            stride,
            chunks,
            padded,
            _CHUNK,
            num_warps=4,
        )
    tables = (rows.floats, rows.integers, rows.token_ids)
    _pick[(num_rows,)](
        *(logits, *partial, slots, seq_lens, *tables, out),
        *(table.stride(0) for table in tables),
        *(num_columns, stride, chunks, padded, _CHUNK, all_greedy),
        num_warps=4,
    )


@triton.jit
def _find_largest(logits_ptr, largest_ptr, ids_ptr, num_columns, stride, CHUNKS: tl.constexpr, PADDED: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = chunk * PADDED + tl.arange(0, PADDED)
    logits = tl.load(logits_ptr + row * stride + column, mask=column < num_columns, other=-float("inf"))
    logits = logits.to(tl.float32)
    logits = tl.where(logits != logits, float("inf"), logits)  # NaN counts as the largest, and ends the request
    largest = tl.max(logits, 0)
    tl.store(largest_ptr + row * CHUNKS + chunk, largest)
    tl.store(ids_ptr + row * CHUNKS + chunk, tl.min(tl.where(logits == largest, column, num_columns), 0))


@triton.jit
def _sum_weights(
    logits_ptr,
    largest_ptr,
    sums_ptr,
    slots_ptr,
    floats_ptr,
    floats_stride,
    num_columns,
    stride,
    CHUNKS: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    temperature = tl.load(floats_ptr + slot * floats_stride).to(tl.float32)
    if temperature < _GREEDY_TEMPERATURE:
        return
    largest = _row_largest(largest_ptr + row * CHUNKS, CHUNKS, PADDED_CHUNKS)
    weights = _weights(logits_ptr + row * stride, chunk, largest, temperature, num_columns, CHUNK)
    tl.store(sums_ptr + row * CHUNKS + chunk, tl.sum(weights, 0))


@triton.jit
def _pick(
    logits_ptr,
    largest_ptr,
    ids_ptr,
    sums_ptr,
    slots_ptr,
    seq_lens_ptr,
    floats_ptr,
    integers_ptr,
    tokens_ptr,
    out_ptr,
    floats_stride,
    integers_stride,
    tokens_stride,
    num_columns,
    stride,
    CHUNKS: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    ALL_GREEDY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    chunk = tl.arange(0, PADDED_CHUNKS)
    at = row * CHUNKS + chunk
    chunk_largest = tl.load(largest_ptr + at, mask=chunk < CHUNKS, other=-float("inf"))
    largest = tl.max(chunk_largest, 0)
    ids = tl.load(ids_ptr + at, mask=chunk < CHUNKS, other=2147483647)
    token = tl.min(tl.where(chunk_largest == largest, ids, 2147483647), 0)
    seq_len = tl.load(seq_lens_ptr + row)
    finite = (largest < float("inf")) & (largest > -float("inf"))
    if not ALL_GREEDY:
        temperature = tl.load(floats_ptr + slot * floats_stride).to(tl.float32)
        integers = integers_ptr + slot * integers_stride
        if (temperature >= _GREEDY_TEMPERATURE) & (tl.load(integers) != 1) & finite:
            position = seq_len - tl.load(integers + 3)
            number = _uniform(tl.load(integers + 1), tl.load(integers + 2), position)
            sums = tl.load(sums_ptr + at, mask=chunk < CHUNKS, other=0.0)
            cumulated = tl.cumsum(sums, 0)
            total = tl.max(cumulated, 0)
            below = (total.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)  # the next smaller number
            target = tl.minimum(number * total, below)
            chosen = tl.sum((cumulated <= target).to(tl.int32), 0)
            before = tl.sum(tl.where(chunk < chosen, sums, 0.0), 0)
            weights = _weights(logits_ptr + row * stride, chosen, largest, temperature, num_columns, CHUNK)
            column = tl.arange(0, CHUNK)
            passed = tl.sum((before + tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
            # Sums in another order may round to just below the target: the last id with a weight is the furthest.
            token = chosen * CHUNK + tl.minimum(passed, tl.max(tl.where(weights > 0.0, column, 0), 0))
    token = tl.where(finite, token, 0)
    tl.store(tokens_ptr + slot * tokens_stride + seq_len, token)
    tl.store(out_ptr + row, tl.where(finite, token, -1))


@triton.jit
def _row_largest(largest_ptr, CHUNKS: tl.constexpr, PADDED: tl.constexpr):
    chunk = tl.arange(0, PADDED)
    return tl.max(tl.load(largest_ptr + chunk, mask=chunk < CHUNKS, other=-float("inf")), 0)


@triton.jit
def _weights(row_ptr, chunk, largest, temperature, num_columns, CHUNK: tl.constexpr):
    """Weights of a chunk's ids, float64; rounded to float32 on the way, as the reference does."""
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = column < num_columns
    logits = tl.load(row_ptr + column, mask=inside, other=-float("inf")).to(tl.float32)
    return tl.where(inside, tl.exp((logits - largest) / temperature), 0.0).to(tl.float64)


@triton.jit
def _uniform(seed, sample_index, position):
    """`sample.random.uniform`, bit for bit."""
    counter = (sample_index << 32) | position
    bits = _mix(_mix(seed + _STEP) + counter * _STEP)
    return (((bits >> 12) & _MASK_52).to(tl.float64) + 0.5) * _ULP


@triton.jit
def _mix(x):
    x = (x ^ ((x >> 30) & _MASK_30)) * _MULTIPLY_1
    x = (x ^ ((x >> 27) & _MASK_27)) * _MULTIPLY_2
    return x ^ ((x >> 31) & _MASK_31)

"""Sampling for a captured decode step: parameters are read by slot, the token goes to the host's buffer and to its row.

The definition is `sample.sampler`'s: greedy rows take the lowest id of the largest logit; others the token at which the
cumulated weights exp((logit - largest) / temperature), in order of ids, first exceed their sum times the uniform number
of `sample.random`. A row is cut into chunks of 2,048 ids: one launch finds each chunk's largest logit, one its sum of
weights (float64), one picks chunk and token. So a row takes part in no other row's sums and 256 rows of 151,936 logits
are read twice, at the speed of memory.

Filters need no sort. All three keep the largest logits down to some threshold, and of those equal to it the lowest ids
up to some number. One more launch finds both: logits are ordered as integers (a float's bits, negative ones turned
round; 16 of them for bf16), and the threshold is searched by halving: the greatest with top_k logits at or above it,
the smallest with less than the nucleus's sum above it. Each halving reads the row from the L2 cache.
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
_ALL = tl.constexpr(-(2**31))  # below every ordered logit
_NO_QUOTA = tl.constexpr(2**31 - 1)
_SIGN_TURNED = tl.constexpr(2**31 - 1)
_SEARCH_TILE = 8192
_UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # of a float32 with the same value
GREEDY, DRAWN, FILTERED = range(3)  # what a step's rows need at most
_GREEDY_TEMPERATURE = tl.constexpr(1e-5)  # common.sampling_params.GREEDY_TEMPERATURE; a test compares them


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingRows:
    """The persistent rows that sampling reads and writes; see `RequestStates`.

    Attributes:
        floats: float64 [num_slots, n]; temperature, top_p, min_p first.
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
        self.num_ties = torch.empty(rows, chunks, dtype=torch.int32, device=device)
        self.thresholds = torch.empty(rows, 2, dtype=torch.int32, device=device)


def sample_decodes(
    logits: torch.Tensor,
    num_columns: int,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    rows: SamplingRows,
    scratch: SamplingScratch,
    out: torch.Tensor,
    *,
    needs: int,
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
        needs: GREEDY (every row is), DRAWN (none has a filter) or FILTERED; leaves out what no row needs.
    """
    num_rows, chunks = slots.shape[0], triton.cdiv(num_columns, _CHUNK)
    grid, stride = (num_rows, chunks), logits.stride(0)
    padded = triton.next_power_of_2(chunks)
    shift = _UNUSED_BITS[logits.dtype]
    _find_largest[grid](logits, scratch.largest, scratch.ids, num_columns, stride, chunks, _CHUNK, num_warps=4)
    tables = (rows.floats, rows.floats.stride(0), rows.integers, rows.integers.stride(0))
    if needs == FILTERED:
        search = (num_columns, stride, chunks, padded, _SEARCH_TILE, shift)
        _find_thresholds[(num_rows,)](
            logits, scratch.largest, scratch.thresholds, slots, *tables, *search, num_warps=16
        )
    partial = (scratch.sums, scratch.num_ties, scratch.thresholds)
    sizes = (num_columns, stride, chunks, padded, _CHUNK)
    if needs != GREEDY:
        _sum_weights[grid](
            *(logits, scratch.largest, *partial, slots, *tables[:2], *sizes),
            *(shift, needs == FILTERED),
            num_warps=4,
        )
    _pick[(num_rows,)](
        *(logits, scratch.largest, scratch.ids, *partial, slots, seq_lens, *tables),
        *(rows.token_ids, rows.token_ids.stride(0), out, *sizes),
        *(shift, needs == GREEDY, needs == FILTERED),
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
def _find_thresholds(
    logits_ptr,
    largest_ptr,
    thresholds_ptr,
    slots_ptr,
    floats_ptr,
    floats_stride,
    integers_ptr,
    integers_stride,
    num_columns,
    stride,
    CHUNKS: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    floats, integers = floats_ptr + slot * floats_stride, integers_ptr + slot * integers_stride
    temperature = tl.load(floats).to(tl.float32)
    top_p, min_p, top_k = tl.load(floats + 1), tl.load(floats + 2).to(tl.float32), tl.load(integers)
    largest = _row_largest(largest_ptr + row * CHUNKS, CHUNKS, PADDED_CHUNKS)
    logits = logits_ptr + row * stride
    threshold = tl.full([], _ALL, tl.int64)  # 64 bits: all differences fit
    top = _ordered(largest, SHIFT).to(tl.int64)
    drawn = (temperature >= _GREEDY_TEMPERATURE) & (largest < float("inf")) & (largest > -float("inf"))
    limits_number = (top_k > 0) & (top_k < num_columns)
    kept_of_top_k = tl.full([], _NO_QUOTA, tl.int64)
    if drawn & limits_number:
        low, high = tl.full([], _ALL >> SHIFT, tl.int64), top + 1
        while high - low > 1:
            middle = low + (high - low) // 2
            enough = _count_above(logits, middle - 1, num_columns, TILE, SHIFT) >= top_k
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        threshold = low
        kept_of_top_k = top_k - _count_above(logits, threshold, num_columns, TILE, SHIFT)
    quota = kept_of_top_k
    if drawn & (top_p < 1.0):
        mass = _mass_above(logits, threshold, largest, temperature, num_columns, TILE, SHIFT)
        if limits_number:
            mass += kept_of_top_k * _weight_of(threshold.to(tl.int32), largest, temperature, SHIFT)
        target = top_p * mass
        outside, nucleus = tl.maximum(threshold, _ALL >> SHIFT) - 1, top
        while nucleus - outside > 1:
            middle = outside + (nucleus - outside) // 2
            less = _mass_above(logits, middle, largest, temperature, num_columns, TILE, SHIFT) < target
            outside, nucleus = tl.where(less, outside, middle), tl.where(less, middle, nucleus)
        left = target - _mass_above(logits, nucleus, largest, temperature, num_columns, TILE, SHIFT)
        weight = _weight_of(nucleus.to(tl.int32), largest, temperature, SHIFT)
        wanted = tl.minimum(left / tl.maximum(weight, 1e-300), 2147483000.0)
        kept_of_nucleus = tl.maximum(tl.ceil(wanted).to(tl.int64), 1)
        quota = tl.where(nucleus == threshold, tl.minimum(kept_of_top_k, kept_of_nucleus), kept_of_nucleus)
        threshold = nucleus
    if drawn & (min_p > 0.0):
        lowest = _lowest_probable(logits, min_p, largest, temperature, num_columns, TILE, SHIFT)
        quota = tl.where(lowest > threshold, _NO_QUOTA, quota)
        threshold = tl.maximum(threshold, lowest.to(tl.int64))
    tl.store(thresholds_ptr + row * 2, threshold.to(tl.int32))
    tl.store(thresholds_ptr + row * 2 + 1, quota.to(tl.int32))


@triton.jit
def _count_above(logits_ptr, threshold, num_columns, TILE: tl.constexpr, SHIFT: tl.constexpr):
    """How many logits are above the threshold: int64."""
    count = tl.zeros([TILE], tl.int32)
    for first in range(0, num_columns, TILE):
        column = first + tl.arange(0, TILE)
        inside = column < num_columns
        logits = tl.load(logits_ptr + column, mask=inside, other=-float("inf")).to(tl.float32)
        count += (inside & (_ordered(logits, SHIFT) > threshold)).to(tl.int32)
    return tl.sum(count, 0).to(tl.int64)


@triton.jit
def _mass_above(logits_ptr, threshold, largest, temperature, num_columns, TILE: tl.constexpr, SHIFT: tl.constexpr):
    """The sum of the weights of the logits above the threshold: float64."""
    mass = tl.zeros([TILE], tl.float64)
    for first in range(0, num_columns, TILE):
        column = first + tl.arange(0, TILE)
        inside = column < num_columns
        logits = tl.load(logits_ptr + column, mask=inside, other=-float("inf")).to(tl.float32)
        kept = inside & (_ordered(logits, SHIFT) > threshold)
        mass += tl.where(kept, tl.exp((logits - largest) / temperature), 0.0).to(tl.float64)
    return tl.sum(mass, 0)


@triton.jit
def _lowest_probable(logits_ptr, min_p, largest, temperature, num_columns, TILE: tl.constexpr, SHIFT: tl.constexpr):
    """The smallest logit whose probability is at least `min_p` times the largest, ordered."""
    lowest = tl.full([TILE], 2147483647, tl.int32)
    for first in range(0, num_columns, TILE):
        column = first + tl.arange(0, TILE)
        inside = column < num_columns
        logits = tl.load(logits_ptr + column, mask=inside, other=-float("inf")).to(tl.float32)
        probable = inside & (tl.exp((logits - largest) / temperature) >= min_p)
        lowest = tl.minimum(lowest, tl.where(probable, _ordered(logits, SHIFT), 2147483647))
    return tl.min(lowest, 0)


@triton.jit
def _ordered(logits, SHIFT: tl.constexpr):
    """float32 → int32 of the same order; SHIFT: bits that no logit uses are dropped."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0, its equal
    return (bits ^ ((bits >> 31) & _SIGN_TURNED)) >> SHIFT


@triton.jit
def _weight_of(ordered, largest, temperature, SHIFT: tl.constexpr):
    """The weight, float64, of the logit that `_ordered` gave this number."""
    turned = (ordered << SHIFT) | ((ordered >> 31) & ((1 << SHIFT) - 1))
    bits = turned ^ ((turned >> 31) & _SIGN_TURNED)
    return tl.exp((bits.to(tl.float32, bitcast=True) - largest) / temperature).to(tl.float64)


@triton.jit
def _sum_weights(
    logits_ptr,
    largest_ptr,
    sums_ptr,
    ties_ptr,
    thresholds_ptr,
    slots_ptr,
    floats_ptr,
    floats_stride,
    num_columns,
    stride,
    CHUNKS: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    SHIFT: tl.constexpr,
    FILTER: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    temperature = tl.load(floats_ptr + slot * floats_stride).to(tl.float32)
    if temperature < _GREEDY_TEMPERATURE:
        return
    largest = _row_largest(largest_ptr + row * CHUNKS, CHUNKS, PADDED_CHUNKS)
    logits, weights = _weights(logits_ptr + row * stride, chunk, largest, temperature, num_columns, CHUNK)
    if FILTER:
        threshold = tl.load(thresholds_ptr + row * 2)
        ordered = _ordered(logits, SHIFT)
        weights = tl.where(ordered > threshold, weights, 0.0)
        ties = (ordered == threshold) & (chunk * CHUNK + tl.arange(0, CHUNK) < num_columns)
        tl.store(ties_ptr + row * CHUNKS + chunk, tl.sum(ties.to(tl.int32), 0))
    tl.store(sums_ptr + row * CHUNKS + chunk, tl.sum(weights, 0))


@triton.jit
def _pick(
    logits_ptr,
    largest_ptr,
    ids_ptr,
    sums_ptr,
    ties_ptr,
    thresholds_ptr,
    slots_ptr,
    seq_lens_ptr,
    floats_ptr,
    floats_stride,
    integers_ptr,
    integers_stride,
    tokens_ptr,
    tokens_stride,
    out_ptr,
    num_columns,
    stride,
    CHUNKS: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    SHIFT: tl.constexpr,
    ALL_GREEDY: tl.constexpr,
    FILTER: tl.constexpr,
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
            number = _uniform(tl.load(integers + 1), tl.load(integers + 2), seq_len - tl.load(integers + 3))
            sums = tl.load(sums_ptr + at, mask=chunk < CHUNKS, other=0.0)
            threshold, kept_ties = tl.load(thresholds_ptr + row * 2), tl.zeros([PADDED_CHUNKS], tl.int32)
            if FILTER:
                ties = tl.load(ties_ptr + at, mask=chunk < CHUNKS, other=0)
                left = tl.load(thresholds_ptr + row * 2 + 1) - (tl.cumsum(ties, 0) - ties)
                kept_ties = tl.minimum(tl.maximum(left, 0), ties)
                some = tl.where(kept_ties > 0, _weight_of(threshold, largest, temperature, SHIFT), 0.0)
                sums += kept_ties.to(tl.float64) * some
            cumulated = tl.cumsum(sums, 0)
            total = tl.max(cumulated, 0)
            below = (total.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)  # the next smaller number
            target = tl.minimum(number * total, below)
            chosen = tl.sum((cumulated <= target).to(tl.int32), 0)
            before = tl.sum(tl.where(chunk < chosen, sums, 0.0), 0)
            logits, weights = _weights(logits_ptr + row * stride, chosen, largest, temperature, num_columns, CHUNK)
            column = tl.arange(0, CHUNK)
            if FILTER:
                ordered = _ordered(logits, SHIFT)
                tie = (ordered == threshold) & (chosen * CHUNK + column < num_columns)
                in_quota = tl.cumsum(tie.to(tl.int32), 0) <= tl.sum(tl.where(chunk == chosen, kept_ties, 0), 0)
                weights = tl.where((ordered > threshold) | (tie & in_quota), weights, 0.0)
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
    """A chunk's logits, and their weights as float64; rounded to float32 on the way, as the reference does."""
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = column < num_columns
    logits = tl.load(row_ptr + column, mask=inside, other=-float("inf")).to(tl.float32)
    return logits, tl.where(inside, tl.exp((logits - largest) / temperature), 0.0).to(tl.float64)


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

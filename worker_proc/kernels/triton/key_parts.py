"""Keys of one attention split among programs: where the parts leave what they have, and how the last one joins them.

Prior art: flash decoding (Dao and others 2023): outputs of parts are joined by their log-sum-exp. The program that
finishes last reads them in the order of the parts, so the result does not depend on who that is, and there is no second
kernel.
"""

import torch
import triton
import triton.language as tl


class PartScratch:
    """Where parts leave what they have; the counters are zero between two launches."""

    def __init__(self, num_rows: int, head_dim: int, num_counters: int, device: torch.device) -> None:
        """`num_rows` of `head_dim` numbers: query rows times parts; `num_counters`: joint results of a launch."""
        self.num_rows = num_rows
        self.outputs = torch.empty(num_rows * head_dim, dtype=torch.float32, device=device)
        self.log_sums = torch.empty(num_rows, dtype=torch.float32, device=device)
        self.num_done = torch.zeros(num_counters, dtype=torch.int32, device=device)


@triton.jit
def leave_part(
    result,
    log_sum,
    outputs_ptr,
    log_sums_ptr,
    counter,
    first_row,
    num_parts,
    num_rows,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Leaves a part's result; True if it is the last of `num_parts`, which has to set the counter to zero again.

    Args:
        result, log_sum: float32 [ROWS, PADDED] and [ROWS]; log_sum to base 2.
        counter: of the parts that are through.
        first_row: of scratch, for this part.
        num_rows: of the result that count; the others are not written.
    """
    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    counts = row < num_rows
    at = (first_row + row)[:, None] * HEAD_DIM + column[None, :]
    tl.store(outputs_ptr + at, result, mask=counts[:, None] & (column < HEAD_DIM)[None, :])
    tl.store(log_sums_ptr + first_row + row, log_sum, mask=counts)
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1


@triton.jit
def join_parts(
    outputs_ptr,
    log_sums_ptr,
    first_row,
    num_parts,
    num_rows,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The parts' outputs, weighted by their sums: [ROWS, PADDED], of which `num_rows` count.

    The first part's begin at `first_row` of scratch, the next one's STRIDE rows later. Four are read before the first
    is needed: one after the other, each would wait for the L2 cache.
    """
    largest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    joined = tl.zeros([ROWS, PADDED], tl.float32)
    for part in range(0, num_parts, 4):
        at, left = first_row + part * STRIDE, num_parts - part
        sum_0, output_0 = _read_part(outputs_ptr, log_sums_ptr, at, num_rows, ROWS, HEAD_DIM, PADDED)
        rows_1, rows_2 = tl.where(left > 1, num_rows, 0), tl.where(left > 2, num_rows, 0)
        rows_3 = tl.where(left > 3, num_rows, 0)
        sum_1, output_1 = _read_part(outputs_ptr, log_sums_ptr, at + STRIDE, rows_1, ROWS, HEAD_DIM, PADDED)
        sum_2, output_2 = _read_part(outputs_ptr, log_sums_ptr, at + 2 * STRIDE, rows_2, ROWS, HEAD_DIM, PADDED)
        sum_3, output_3 = _read_part(outputs_ptr, log_sums_ptr, at + 3 * STRIDE, rows_3, ROWS, HEAD_DIM, PADDED)
        new_largest = tl.maximum(tl.maximum(largest, sum_0), tl.maximum(tl.maximum(sum_1, sum_2), sum_3))
        shrink, weight_0 = tl.exp2(largest - new_largest), tl.exp2(sum_0 - new_largest)
        weight_1, weight_2 = tl.exp2(sum_1 - new_largest), tl.exp2(sum_2 - new_largest)
        weight_3 = tl.exp2(sum_3 - new_largest)
        joined = joined * shrink[:, None] + output_0 * weight_0[:, None] + output_1 * weight_1[:, None]
        joined += output_2 * weight_2[:, None] + output_3 * weight_3[:, None]
        total = total * shrink + weight_0 + weight_1 + weight_2 + weight_3
        largest = new_largest
    return joined / total[:, None]


@triton.jit
def _read_part(
    outputs_ptr,
    log_sums_ptr,
    first_row,
    num_rows,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Log-sums [ROWS] and outputs [ROWS, PADDED]; what does not count has no weight."""
    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    counts = row < num_rows
    log_sum = tl.load(log_sums_ptr + first_row + row, mask=counts, other=-1e30, cache_modifier=".cg")
    at = (first_row + row)[:, None] * HEAD_DIM + column[None, :]
    inside = counts[:, None] & (column < HEAD_DIM)[None, :]
    return log_sum, tl.load(outputs_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")

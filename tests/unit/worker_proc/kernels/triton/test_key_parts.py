"""Parts of an attention, left by one program each and joined by the last, against softmax over all of them."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

import triton
import triton.language as tl

from folovllm.worker_proc.kernels.triton.key_parts import PartScratch, join_parts, leave_part

ROWS, HEAD_DIM, PADDED = 16, 24, 32


@triton.jit
def _leave_and_join(
    results_ptr,
    log_sums_ptr,
    out_ptr,
    scratch_ptr,
    scratch_sums_ptr,
    done_ptr,
    num_rows,
    ROWS: tl.constexpr,
    JOIN_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    tile, part, num_parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    in_head = column < HEAD_DIM
    base = tile * num_parts * ROWS
    at = base + part * ROWS + row
    result = tl.load(results_ptr + at[:, None] * HEAD_DIM + column[None, :], mask=in_head[None, :], other=0.0)
    log_sum = tl.load(log_sums_ptr + at)
    counter = done_ptr + tile
    if leave_part(
        result, log_sum, scratch_ptr, scratch_sums_ptr, counter, base + part * ROWS, num_parts, num_rows,
        ROWS, HEAD_DIM, PADDED,
    ):  # fmt: skip
        for first in range(0, num_rows, JOIN_ROWS):
            joined = join_parts(
                scratch_ptr, scratch_sums_ptr, base + first, num_parts, num_rows - first, ROWS, JOIN_ROWS,
                HEAD_DIM, PADDED,
            )  # fmt: skip
            place = first + tl.arange(0, JOIN_ROWS)
            inside = (place < num_rows)[:, None] & in_head[None, :]
            tl.store(out_ptr + (tile * ROWS + place)[:, None] * HEAD_DIM + column[None, :], joined, mask=inside)
        tl.store(counter, 0)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize(("num_rows", "join_rows"), [(16, 16), (5, 16), (13, 4)])
def test_parts_are_weighted_by_their_sums(device: torch.device, num_parts: int, num_rows: int, join_rows: int) -> None:
    """For two tiles in one launch, twice with the same counters; rows that do not count are left alone."""
    generator = torch.Generator().manual_seed(num_parts)
    results = torch.randn(2, num_parts, ROWS, HEAD_DIM, generator=generator).to(device)
    log_sums = (torch.randn(2, num_parts, ROWS, generator=generator) * 10).to(device)
    log_sums[:, 1:, 0] = -1e30  # a query that sees no key of these parts
    scratch = PartScratch(2 * num_parts * ROWS, HEAD_DIM, 2, device)
    scratch.outputs.fill_(torch.nan)  # what is read without having been written would show
    scratch.log_sums.fill_(torch.nan)
    expected = (results * torch.softmax(log_sums * torch.tensor(2.0).log(), dim=1)[..., None]).sum(1)
    for _ in range(2):
        out = torch.full((2, ROWS, HEAD_DIM), -7.0, device=device)
        _leave_and_join[(2, num_parts)](
            *(results, log_sums, out, scratch.outputs, scratch.log_sums, scratch.num_done, num_rows),
            *(ROWS, join_rows, HEAD_DIM, PADDED),
        )
        torch.testing.assert_close(out[:, :num_rows], expected[:, :num_rows])
        assert out[:, num_rows:].eq(-7.0).all()
        assert scratch.num_done.tolist() == [0, 0]

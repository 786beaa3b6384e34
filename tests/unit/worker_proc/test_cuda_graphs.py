"""What is decided before anything is captured; the captured steps themselves are in `tests/gpu/test_cuda_graphs.py`."""

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from folovllm.worker_proc.attention.triton_paged import HeadCounts, TritonPagedBackend
from folovllm.worker_proc.cuda_graphs import decode_buckets
from folovllm.worker_proc.device import Placement


@pytest.mark.parametrize("most", [1, 3, 12, 256, 300, 1000])
def test_buckets_reach_every_number_of_rows(most: int) -> None:
    buckets = decode_buckets(most)
    assert buckets == sorted(set(buckets)) and buckets[0] == 1 and buckets[-1] == most
    for rows in range(1, most + 1):
        bucket = next(size for size in buckets if size >= rows)
        assert bucket - rows < max(8, 0.25 * rows)


@pytest.mark.parametrize("requests", [1, 4, 16, 64, 256, 2048, 5000])
@pytest.mark.parametrize("longest", [1, 128, 1000, 16000, 100_000])
def test_parts_are_a_power_of_two_and_fit_the_scratch(requests: int, longest: int) -> None:
    backend = TritonPagedBackend(HeadCounts(4, 2, 64), Placement(torch.device("cpu"), torch.float32))
    parts, smallest = backend.choose_parts(requests, longest)
    assert parts & (parts - 1) == 0 and smallest % 128 == 0
    assert parts == 1 or parts * requests <= 2048
    assert parts == 1 or parts * smallest <= 4 * max(longest, 256)


def test_a_padded_step_has_the_parts_of_one_that_is_not() -> None:
    backend = TritonPagedBackend(HeadCounts(4, 2, 64), Placement(torch.device("cpu"), torch.float32))
    for longest in (1, 700, 1024, 1025, 5000, 70_000):
        for rows in range(1, 257):
            padded = next(size for size in (*decode_buckets(256), 256) if size >= rows)
            in_a_pass = next(size for size in (16, 64, 256) if size >= rows)
            parts = [backend.choose_parts(number, longest) for number in (rows, padded, in_a_pass)]
            assert parts[0] == parts[1] == parts[2]

"""The list of tiles; the kernel itself is compared in `attention/test_triton_paged.py`."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from folovllm.worker_proc.kernels.triton.paged_prefill import plan_tiles, rows_per_tile


def test_every_token_is_in_one_tile_and_the_longest_context_comes_first() -> None:
    tiles = plan_tiles([5, 130], [205, 130], np.array([7, 3]), first_token=2, tokens=64)
    assert tiles.dtype == np.int32
    assert tiles.tolist() == [[7, 2, 200, 5], [3, 135, 128, 2], [3, 71, 64, 64], [3, 7, 0, 64]]


def test_large_tiles_only_where_there_are_many_tokens_and_registers() -> None:
    assert rows_per_tile(128, torch.bfloat16, 16384) == 256
    assert rows_per_tile(128, torch.bfloat16, 1024) == 128
    assert rows_per_tile(256, torch.bfloat16, 16384) == rows_per_tile(64, torch.float32, 16384) == 64

"""The list of tiles; the kernel itself is compared in `attention/test_triton_paged.py`."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from folovllm.worker_proc.kernels.triton.paged_prefill import plan_tiles, rows_per_tile, split_tiles


def test_every_token_is_in_one_tile_and_the_longest_context_comes_first() -> None:
    tiles = plan_tiles([5, 130], [205, 130], np.array([7, 3]), first_token=2, tokens=64)
    assert tiles.dtype == np.int32
    assert tiles.tolist() == [
        [7, 2, 200, 5, 0, 1, 205, 0],
        [3, 135, 128, 2, 0, 1, 130, 0],
        [3, 71, 64, 64, 0, 1, 130, 0],
        [3, 7, 0, 64, 0, 1, 130, 0],
    ]


def test_large_tiles_only_where_there_are_many_tokens_and_registers() -> None:
    assert rows_per_tile(128, torch.bfloat16, 16384) == 256
    assert rows_per_tile(128, torch.bfloat16, 1024) == 128
    assert rows_per_tile(256, torch.bfloat16, 16384) == rows_per_tile(64, torch.float32, 16384) == 64


def test_a_tile_alone_has_as_many_parts_as_its_keys_are_worth() -> None:
    for seq_len, most, parts, keys in (
        (511, 16, 1, 511),
        (512, 16, 2, 256),
        (4096, 16, 16, 256),
        (4097, 16, 13, 320),
        (16016, 16, 16, 1024),
        (16016, 3, 2, 8064),
        (16016, 1, 1, 16016),
        (16016, 0, 1, 16016),
    ):
        tiles = split_tiles(plan_tiles([16], [seq_len], np.array([2]), 0, 64), most)
        assert tiles.dtype == np.int32
        assert tiles.tolist() == [[2, 0, seq_len - 16, 16, part, parts, keys, 0] for part in range(parts)]


def test_long_tiles_are_split_and_short_ones_stay_whole() -> None:
    tiles = split_tiles(plan_tiles([8, 8, 8], [1000, 8, 3000], np.array([0, 1, 2]), 0, 64), 8)
    assert tiles[:, [0, 4, 5, 6, 7]].tolist() == [
        *([2, part, 5, 640, 0] for part in range(5)),
        [0, 0, 1, 1024, 5],
        [1, 0, 1, 64, 5],
    ]


@pytest.mark.parametrize("seed", range(20))
def test_every_key_is_in_one_part_and_parts_have_scratch_of_their_own(seed: int) -> None:
    generator = np.random.default_rng(seed)
    query_lens = generator.integers(2, 150, generator.integers(1, 12))
    seq_lens = query_lens + (generator.exponential(3000, len(query_lens))).astype(np.int64)
    most = int(generator.integers(0, 33))
    whole = plan_tiles(query_lens.tolist(), seq_lens.tolist(), np.arange(len(query_lens)), 0, 64)
    tiles = split_tiles(whole, most)
    assert len(tiles) <= len(whole) + max(most - 1, 0)
    parts = tiles[tiles[:, 5] > 1]
    assert len(parts) <= most
    assert (parts[:, 7] + parts[:, 4]).tolist() == list(range(len(parts)))
    kept = {tuple(tile[:4]): [part for part in tiles.tolist() if part[:4] == tile[:4]] for tile in whole.tolist()}
    for (_, _, position, length), found in kept.items():
        assert [part[4] for part in found] == list(range(found[0][5]))
        keys = found[0][6]
        assert (len(found) - 1) * keys < position + length <= len(found) * keys
        assert len(found) == 1 or keys % 64 == 0

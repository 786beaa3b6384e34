"""The compiled kernel against its definition in float32, and against what must not reach it."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("llvmlite", reason="kernels for the CPU are compiled by llvmlite")

from folovllm.worker_proc.kernels.cpu.compiled import prepare
from folovllm.worker_proc.kernels.cpu.decode_attention import DecodeAttention, HeadShape, cut_into_parts
from folovllm.worker_proc.kernels.cpu.team import find_team

LENGTHS = [1, 15, 16, 17, 200, 33, 64, 31, 257, 700]
SHAPES = [
    HeadShape(3, 3, 64, 16, "bfloat16"),
    HeadShape(2, 2, 128, 16, "bfloat16"),
    HeadShape(2, 1, 64, 32, "float16"),
    HeadShape(1, 8, 128, 16, "bfloat16"),
    HeadShape(2, 4, 32, 48, "float16"),
    HeadShape(1, 2, 96, 16, "bfloat16"),
]


def make(shape: HeadShape) -> DecodeAttention:
    team = find_team()
    if team is None:
        pytest.skip("this torch does not use GNU's OpenMP")
    prepare()
    return DecodeAttention(shape, team)


def blocks_for(shape: HeadShape, lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (a strided view, as the network's are), cache and block table; what lies past an end is not a number."""
    torch.manual_seed(seed)
    dtype = getattr(torch, shape.kind)
    width = max(-(-length // shape.block_size) for length in lengths) + 1
    num_blocks = len(lengths) * width + 1
    cache = torch.randn(2, shape.num_kv_heads, num_blocks, shape.block_size, shape.head_dim).to(dtype)
    table = (torch.randperm(num_blocks - 1)[: len(lengths) * width] + 1).view(len(lengths), width)
    for row, length in enumerate(lengths):
        last, used = divmod(length, shape.block_size)
        cache[:, :, table[row, last], used:] = float("nan")
    heads = shape.num_kv_heads * shape.group
    fused = torch.randn(len(lengths), heads + 2 * shape.num_kv_heads, shape.head_dim).to(dtype)
    return fused[:, :heads], cache, table


def expected(
    shape: HeadShape, query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    rows = []
    for row, length in enumerate(lengths):
        keys, values = cache[:, :, table[row]].flatten(2, 3)[:, :, :length].float()
        grouped = query[row].float().view(shape.num_kv_heads, shape.group, shape.head_dim)
        weights = torch.softmax(grouped @ keys.transpose(1, 2) / math.sqrt(shape.head_dim), dim=-1)
        rows.append((weights @ values).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_attention(shape: HeadShape) -> None:
    kernel = make(shape)
    query, cache, table = blocks_for(shape, LENGTHS, seed=0)
    found = kernel.plan(table, LENGTHS, cache).attend(query, cache).float()
    right = expected(shape, query, cache, table, LENGTHS)
    assert (found - right).norm() / right.norm() < (2e-3 if shape.kind == "bfloat16" else 3e-4)
    assert (found - right).abs().max() < 0.02 * right.abs().max()


def test_one_plan_serves_all_layers_and_any_number_of_requests() -> None:
    shape = SHAPES[0]
    kernel = make(shape)
    for lengths in ([1], [700], [5, 5, 5], LENGTHS * 4):
        query, cache, table = blocks_for(shape, lengths, seed=len(lengths))
        layers = [cache, torch.randn_like(cache.nan_to_num())]
        plan = kernel.plan(table, lengths, cache)
        for layer in layers:
            right = expected(shape, query, layer, table, lengths)
            assert (plan.attend(query, layer).float() - right).norm() / right.norm() < 2e-3


def test_a_request_does_not_depend_on_the_others() -> None:
    shape = SHAPES[0]
    kernel = make(shape)
    query, cache, table = blocks_for(shape, LENGTHS, seed=3)
    together = kernel.plan(table, LENGTHS, cache).attend(query, cache)
    for row, length in enumerate(LENGTHS):
        alone = kernel.plan(table[row : row + 1], [length], cache).attend(query[row : row + 1], cache)
        assert torch.equal(alone[0], together[row])


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    shape = SHAPES[0]
    kernel = make(shape)
    query, cache, table = blocks_for(shape, [40, 3], seed=1)
    query = query * 60
    right = expected(shape, query, cache, table, [40, 3])
    found = kernel.plan(table, [40, 3], cache).attend(query, cache).float()
    assert (found - right).norm() / right.norm() < 5e-3


def test_what_is_not_a_number_in_ones_own_keys_shows_in_ones_own_row_alone() -> None:
    shape = SHAPES[0]
    kernel = make(shape)
    query, cache, table = blocks_for(shape, [20, 20], seed=2)
    clean = kernel.plan(table, [20, 20], cache).attend(query, cache)
    cache[0, :, table[0, 0], 3] = float("nan")
    found = kernel.plan(table, [20, 20], cache).attend(query, cache)
    assert found[0].isnan().all()
    assert torch.equal(found[1], clean[1])


def test_it_writes_where_it_is_told_to() -> None:
    shape = SHAPES[0]
    query, cache, table = blocks_for(shape, [20, 300], seed=2)
    kernel = make(shape)
    plan = kernel.plan(table, [20, 300], cache)
    room = torch.zeros(4, query.shape[1] * shape.head_dim, dtype=query.dtype)
    assert plan.attend(query, cache, room[1:3]).data_ptr() == room[1].data_ptr()
    assert torch.equal(room[1:3], plan.attend(query, cache))
    assert not room[0].any() and not room[3].any()


def test_queries_whose_heads_are_apart_are_brought_together() -> None:
    shape = SHAPES[0]
    kernel = make(shape)
    query, cache, table = blocks_for(shape, [20, 9], seed=2)
    apart = torch.empty(2, shape.head_dim, query.shape[1], dtype=query.dtype).transpose(1, 2)
    apart.copy_(query)
    plan = kernel.plan(table, [20, 9], cache)
    assert torch.equal(plan.attend(apart, cache), plan.attend(query, cache))


@pytest.mark.parametrize("block_size", [16, 48, 512])
def test_parts_cover_each_context_once_in_whole_blocks(block_size: int) -> None:
    shape = HeadShape(2, 3, 64, block_size, "bfloat16")
    lengths = [1, 255, 256, 257, 300, 700, 5000]
    parts = cut_into_parts(shape, np.array(lengths))
    assert parts[:, 4].tolist() == list(range(len(parts)))
    for request, length in enumerate(lengths):
        for head in range(2):
            own = parts[(parts[:, 0] == request) & (parts[:, 1] == head)]
            begins, ends = own[:, 2].tolist(), own[:, 3].tolist()
            assert begins == [0, *ends[:-1]] and ends[-1] == length
            assert all(begin % block_size == 0 for begin in begins)
            assert max(end - begin for begin, end in zip(begins, ends, strict=True)) <= max(256, block_size)
            assert (own[:, 5] == own[0, 4]).all() and (own[:, 6] == len(own)).all()
            assert (own[:, 7] == 2 * request + head).all()


def test_a_long_context_occupies_all_threads() -> None:
    parts = cut_into_parts(SHAPES[0], np.array([7000]))
    halves = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    tokens = [int((half[:, 3] - half[:, 2]).sum()) for half in halves]
    assert max(tokens) < 1.02 * min(tokens)


@pytest.mark.parametrize(
    "shape",
    [
        HeadShape(1, 1, 80, 16, "bfloat16"),
        HeadShape(1, 1, 64, 8, "bfloat16"),
        HeadShape(1, 1, 64, 16, "float32"),
        HeadShape(1, 32, 128, 16, "bfloat16"),
    ],
    ids=str,
)
def test_shapes_without_a_kernel_are_known(shape: HeadShape) -> None:
    assert not shape.is_supported

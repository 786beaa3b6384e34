"""The paged backend against the reference, on steps of every shape."""

import itertools
import math

import pytest
import torch

from folovllm.common.model_config import ModelConfig, RopeConfig
from folovllm.worker_proc.attention.paged import PagedBackend, similar_lengths
from folovllm.worker_proc.attention.torch_naive import TorchNaiveBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kv_tensors import KVTensors
from tests.fakes.attention import PagedRequest, build_metadata, scattered_blocks

HEAD_DIM = 16


def make_kv(kv_heads: int, num_blocks: int, block_size: int, dtype: torch.dtype = torch.float32) -> KVTensors:
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=10,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-6,
        rope=RopeConfig(),
        max_position_embeddings=64,
    )
    return KVTensors(config, num_blocks, block_size, Placement(torch.device("cpu"), dtype))


def compare(
    contexts: list[int],
    query_lens: list[int],
    *,
    heads: tuple[int, int] = (4, 2),
    block_size: int = 8,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-6,
) -> None:
    """Both backends on the same random cache and step: the same output, the same cache afterwards."""
    num_q_heads, num_kv_heads = heads
    lengths = [context + length for context, length in zip(contexts, query_lens, strict=True)]
    blocks, num_blocks = scattered_blocks(lengths, block_size)
    requests = [PagedRequest(owned, context) for owned, context in zip(blocks, contexts, strict=True)]
    metadata = build_metadata(requests, query_lens, block_size)
    generator = torch.Generator().manual_seed(2)
    tokens = sum(query_lens)
    heads_of_tokens = torch.randn(tokens, num_q_heads + 2 * num_kv_heads, HEAD_DIM, generator=generator).to(dtype)
    query, key_and_value = heads_of_tokens[:, :num_q_heads], heads_of_tokens[:, num_q_heads:]
    caches = [make_kv(num_kv_heads, num_blocks, block_size, dtype) for _ in range(2)]
    caches[0].data.copy_(torch.randn(caches[0].data.shape, generator=generator))
    caches[1].data.copy_(caches[0].data)
    expected = TorchNaiveBackend().begin_step(caches[0], metadata).attend(1, query, key_and_value)
    step = PagedBackend(num_q_heads).begin_step(caches[1], metadata)
    for _ in range(2):  # a step's plan serves every layer; writing the same tokens again changes nothing
        actual = step.attend(1, query, key_and_value)
        assert actual.shape == (tokens, num_q_heads * HEAD_DIM) and actual.dtype == dtype
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    for layer, ends in ((0, contexts), (1, lengths)):  # layer 1 has the step's tokens too
        rows = caches[0].token_row_ids(slots_of(blocks, ends, block_size))
        assert torch.equal(caches[0].token_rows(layer)[rows], caches[1].token_rows(layer)[rows])


def slots_of(blocks: list[list[int]], ends: list[int], block_size: int) -> torch.Tensor:
    """Where the first `ends` tokens of each request lie."""
    return torch.tensor(
        [
            owned[i // block_size] * block_size + i % block_size
            for owned, end in zip(blocks, ends, strict=True)
            for i in range(end)
        ],
        dtype=torch.int64,
    )


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (9, 3)])
def test_decodes(heads: tuple[int, int]) -> None:
    compare([20, 30, 15, 29], [1, 1, 1, 1], heads=heads)


@pytest.mark.parametrize("context", [0, 1, 6, 7, 8, 9, 15, 16, 17])
def test_decode_around_block_borders(context: int) -> None:
    compare([context], [1])
    compare([context, 10], [1, 1])


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_block_sizes(block_size: int) -> None:
    compare([20, 30, 5, 40, 0], [1, 1, 1, 9, 12], block_size=block_size)


@pytest.mark.parametrize(("context", "length"), list(itertools.product([0, 1, 7, 8, 20], [2, 7, 8, 9, 25])))
def test_chunks_with_and_without_context(context: int, length: int) -> None:
    compare([context], [length])


def test_mixed_steps_and_lengths_far_apart() -> None:
    compare([3, 200, 90, 4, 0, 17], [1, 1, 1, 1, 30, 5])
    compare([200, 3, 90], [1, 1, 1])
    compare([0, 9], [4, 4], heads=(9, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    compare([20, 70, 0, 9], [1, 1, 12, 8], heads=(9, 3), dtype=dtype, tolerance=2e-2)


@pytest.mark.parametrize("stale", [1e30, math.inf, -math.inf, math.nan])
def test_stale_numbers_past_a_requests_end_have_no_effect(stale: float) -> None:
    kv = make_kv(2, 4, 8)
    kv.data[:, :, :, 1:] = stale
    # The first has two blocks of which it has reached one: the first token of a prompt whose chunk was cut to one.
    metadata = build_metadata([PagedRequest([1, 3]), PagedRequest([2])], [1, 1], 8)
    heads = torch.randn(2, 8, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    output = PagedBackend(4).begin_step(kv, metadata).attend(0, heads[:, :4], heads[:, 4:])
    values = heads[:, 6:].repeat_interleave(2, dim=1).flatten(1)  # one token: its own value, whatever the weights
    torch.testing.assert_close(output, values)


@pytest.mark.parametrize("first_chunk", [1, 3, 8, 9, 11, 15])
def test_an_overflow_in_one_request_stays_out_of_those_that_get_its_blocks(first_chunk: int) -> None:
    kv, backend = make_kv(2, 6, 8, torch.float16), PagedBackend(4)
    generator = torch.Generator().manual_seed(first_chunk)
    poison = torch.full((40, 8, HEAD_DIM), math.inf, dtype=torch.float16)
    backend.begin_step(kv, build_metadata([PagedRequest([1, 2, 3, 4, 5])], [40], 8)).attend(
        0, poison[:, :4], poison[:, 4:]
    )
    neighbour, reuser = PagedRequest([1, 2, 3]), PagedRequest([4, 5])
    for lengths in ([first_chunk, 17], [1, 1], [1, 1]):
        order = [reuser, neighbour]
        metadata = build_metadata(order, lengths, 8)
        heads = torch.randn(sum(lengths), 8, HEAD_DIM, generator=generator).half()
        output = backend.begin_step(kv, metadata).attend(0, heads[:, :4], heads[:, 4:])
        assert output.isfinite().all()
        for request, length in zip(order, lengths, strict=True):
            request.num_computed += length
            if request.num_computed == 8 * len(request.blocks):
                return


def test_similar_lengths_bounds_padding() -> None:
    assert similar_lengths([5, 10, 7]) == [[0, 1, 2]]
    assert similar_lengths([5, 11, 100, 60, 6]) == [[2, 3], [1, 4], [0]]
    lengths = [(7 * row) % 97 + 1 for row in range(97)]
    groups = similar_lengths(lengths)
    assert sorted(row for group in groups for row in group) == list(range(97))
    for group in groups:
        assert max(lengths[row] for row in group) <= 2 * min(lengths[row] for row in group)

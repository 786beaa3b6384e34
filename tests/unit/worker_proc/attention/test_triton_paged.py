"""Triton's attention against the reference, on steps of every shape; on the GPU, or in Triton's interpreter."""

import numpy as np
import pytest
import torch

from folovllm.worker_proc.attention.backend import AttentionBackend
from folovllm.worker_proc.attention.torch_naive import TorchNaiveBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kv_tensors import KVTensors
from tests.fakes.attention import PagedRequest, build_metadata, scattered_blocks
from tests.fakes.attention import model_config as config_of
from tests.fakes.triton_device import half_types, triton_device


def compare(
    contexts: list[int],
    query_lens: list[int],
    *,
    heads: tuple[int, int, int] = (4, 2, 64),
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
) -> None:
    """Both backends on the same random cache and step: the same output, the same cache afterwards."""
    device = triton_device()
    from folovllm.worker_proc.attention.triton_paged import HeadCounts, TritonPagedBackend

    num_q_heads, num_kv_heads, head_dim = heads
    lengths = [context + length for context, length in zip(contexts, query_lens, strict=True)]
    blocks, num_blocks = scattered_blocks(lengths, block_size)
    requests = [PagedRequest(owned, context) for owned, context in zip(blocks, contexts, strict=True)]
    metadata = build_metadata(requests, query_lens, block_size, device)
    generator = torch.Generator().manual_seed(2)
    flat = torch.randn(sum(query_lens), num_q_heads + 2 * num_kv_heads, head_dim, generator=generator)
    flat = flat.to(device, dtype)
    config = config_of(num_kv_heads, head_dim)
    placement = Placement(device, dtype, fp8_cache=fp8)
    caches = [KVTensors(config, num_blocks, block_size, placement) for _ in range(2)]
    caches[0].data.copy_(torch.randn(caches[0].data.shape, generator=generator))
    for cache in caches:
        if cache.scales is not None:  # another one for each head; some numbers are too large for theirs
            numbers = torch.arange(1, cache.scales.numel() + 1).view(cache.scales.shape) / 300
            cache.scales.copy_(numbers)
    caches[0].data[:, :, :, 0] = torch.nan  # what is read beyond an end would show
    caches[1].data.copy_(caches[0].data)
    backends: tuple[AttentionBackend, ...] = (
        TorchNaiveBackend(),
        TritonPagedBackend(HeadCounts(*heads), Placement(device, dtype)),
    )
    outputs = []
    for cache, backend in zip(caches, backends, strict=True):
        step = backend.begin_step(cache, metadata)
        outputs.append(step.attend(1, flat[:, :num_q_heads], flat[:, num_q_heads:]).float())
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(outputs[1], outputs[0], atol=tolerance, rtol=tolerance)
    stored = [cache.data[:, :, :, 1:].float() for cache in caches]
    assert torch.equal(stored[0], stored[1])


@pytest.mark.parametrize("contexts", [[0], [15, 16, 17], [0, 63, 64, 65, 200]])
def test_decodes(contexts: list[int]) -> None:
    compare(contexts, [1] * len(contexts))


@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 1, 64), (3, 1, 64), (4, 2, 96), (4, 2, 128)])
def test_head_counts_and_sizes(heads: tuple[int, int, int]) -> None:
    compare([40, 0, 20], [1, 1, 30], heads=heads)


@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_block_sizes(block_size: int) -> None:
    compare([70, 3, 5], [1, 1, 80], block_size=block_size)


def test_a_request_in_several_parts_is_joined() -> None:
    compare([300, 5, 129], [1, 1, 1])


def test_chunks_with_and_without_context() -> None:
    compare([0, 100, 17, 0], [1, 70, 5, 140])


def test_an_even_number_of_parts_that_a_length_does_not_fill() -> None:
    compare([700], [1])


@pytest.mark.parametrize(
    ("contexts", "query_lens"),
    [
        ([495], [16]),  # 511 keys: whole
        ([496], [16]),  # two parts
        ([510], [3]),  # the second part begins at a key that the first query does not see
        ([1020], [3]),  # the last part ends with such keys
        ([2100, 0, 300, 700], [17, 5, 40, 30]),  # many parts beside tiles of one part and of two
    ],
)
def test_keys_of_a_few_tokens_over_a_long_context_are_split(contexts: list[int], query_lens: list[int]) -> None:
    compare(contexts, query_lens, heads=(2, 1, 64))


def test_split_tiles_beside_split_decodes() -> None:
    compare([600, 5, 1500, 10], [1, 1, 20, 88], heads=(4, 2, 32))


@pytest.mark.parametrize("heads", [(1, 1, 128), (4, 1, 64), (8, 1, 64), (3, 1, 96), (2, 1, 256)])
def test_split_tiles_of_every_head_count_and_size(heads: tuple[int, int, int]) -> None:
    compare([900, 600], [10, 40], heads=heads)


def test_split_tiles_of_16_bits_and_of_fp8() -> None:
    for dtype in half_types(triton_device()):
        compare([1200, 30], [20, 70], dtype=dtype)
        compare([1200, 30], [20, 70], dtype=dtype, fp8=True)
    compare([1200, 30], [20, 70], fp8=True)


def test_fewer_parts_where_there_are_more_heads_or_tokens() -> None:
    """Programs are counted: with 32 KV heads a tile has at most 4 parts, with 65 it stays whole."""
    device = triton_device()
    from folovllm.worker_proc.attention.triton_paged import HeadCounts, TritonPagedBackend

    found = []
    for num_heads in (1, 32, 65, 200):
        backend = TritonPagedBackend(HeadCounts(num_heads, num_heads, 16), Placement(device, torch.float32))
        for num_tokens in (64, 512, 513):
            planned = backend.plan_tiles(([20], [1600]), np.array([0]), 0, num_tokens)
            assert len(planned) <= 1 + backend.tile_parts(num_tokens)
            assert planned[:, 4].tolist() == list(range(len(planned)))
            found.append((len(planned), int(planned[0, 6])))
    assert found == [(5, 320), (5, 320), (1, 1600)] + [(4, 448), (4, 448), (1, 1600)] + [(1, 1600)] * 6


def test_a_padded_step_is_split_as_one_that_is_not_and_leaves_its_counters_at_zero() -> None:
    """As a captured pass has it: tiles and tokens of padding, twice in a row, to the bit the same."""
    device = triton_device()
    from folovllm.worker_proc.attention.triton_paged import HeadCounts, TritonPagedBackend

    heads, block_size, context, length = HeadCounts(2, 1, 64), 16, 1100, 20
    blocks, num_blocks = scattered_blocks([context + length], block_size)
    kv = KVTensors(config_of(1, 64), num_blocks, block_size, Placement(device, torch.float32))
    kv.data.copy_(torch.randn(kv.data.shape, generator=torch.Generator().manual_seed(1)))
    metadata = build_metadata([PagedRequest(blocks[0], context)], [length], block_size, device)
    flat = torch.randn(64, 4, 64, generator=torch.Generator().manual_seed(3)).to(device)
    backend = TritonPagedBackend(heads, Placement(device, torch.float32))
    none = torch.zeros(0, dtype=torch.int64, device=device)
    places = torch.full((64,), -1, device=device)
    places[:length] = metadata.slot_mapping
    alone = backend.begin_step(kv, metadata).attend(0, flat[:length, :2], flat[:length, 2:])
    planned = backend.plan_tiles(([length], [context + length]), np.array([0]), 0, 64)
    assert len(planned) == 4
    for room in (4, 8):
        tiles = torch.zeros(room, planned.shape[1], dtype=torch.int32, device=device)
        tiles[: len(planned)] = torch.from_numpy(planned)
        step = backend.begin_padded(kv, metadata.block_table, (none, none, (1, 128)), (tiles, places, 0))
        for _ in range(2):
            assert torch.equal(step.attend(0, flat[:, :2], flat[:, 2:])[:length], alone)
    expected = TorchNaiveBackend().begin_step(kv, metadata).attend(0, flat[:length, :2], flat[:length, 2:])
    torch.testing.assert_close(alone, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("heads", [(4, 2, 64), (3, 1, 96)])
def test_an_fp8_cache_is_written_and_read_with_its_heads_scales(heads: tuple[int, int, int]) -> None:
    """Decodes of one part and of several, chunks with context and without: bit for bit what the reference stores."""
    compare([40, 0, 300, 20, 0], [1, 1, 1, 30, 50], heads=heads, fp8=True)


@pytest.mark.parametrize("heads", [(4, 2, 64), (3, 1, 96)])
def test_an_fp8_cache_of_a_model_of_16_bits(heads: tuple[int, int, int]) -> None:
    """Products are in float16 whatever the model's type is, and a tile is as large as it is in use."""
    for dtype in half_types(triton_device()):
        compare([40, 0, 300, 20, 0], [1, 1, 1, 30, 50], heads=heads, dtype=dtype, fp8=True)


def test_every_number_of_fp8_is_read_as_it_was_stored() -> None:
    """A value of which all weights are on one key comes out as it is, whichever column and code it has."""
    device = triton_device()
    from folovllm.worker_proc.attention.triton_paged import HeadCounts, TritonPagedBackend

    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = torch.where(codes.isfinite(), codes, 0.0)
    for dtype in (torch.float32, *half_types(device)):
        kv = KVTensors(config_of(1, 64), 2, 16, Placement(device, dtype, fp8_cache=True))
        values = torch.cat((codes, codes.roll(1))).view(8, 64)  # at even columns and at odd ones
        kv.data[1, 1, 0, 1, :8] = values.to(device).to(torch.float8_e4m3fn)
        kv.data[1, 0, 0, 1, :8, :8] = (torch.eye(8) * 64).to(device).to(torch.float8_e4m3fn)
        for chosen in range(8):
            request = PagedRequest([1], 8)
            step = TritonPagedBackend(HeadCounts(1, 1, 64), Placement(device, dtype)).begin_step(
                kv, build_metadata([request], [1], 16, device)
            )
            query, new = torch.zeros(1, 1, 64, device=device), torch.zeros(1, 2, 64, device=device)
            query[..., chosen] = 60.0
            found = step.attend(1, query.to(dtype), new.to(dtype))
            assert torch.equal(found[0].float().cpu(), values[chosen].to(dtype).float())


def test_queries_too_large_for_float16_are_clamped() -> None:
    device = triton_device()
    if device.type != "cuda":
        pytest.skip("the interpreter multiplies the bits of bfloat16")
    from folovllm.worker_proc.attention.triton_paged import HeadCounts, TritonPagedBackend

    kv = KVTensors(config_of(1, 64), 2, 16, Placement(device, torch.bfloat16, fp8_cache=True))
    kv.data[1, 0, 0, 1, 3] = 1.0
    kv.data[1, 1, 0, 1, 3] = 7.0
    for query_len in (1, 2):  # both kernels
        request = PagedRequest([1], 8)
        step = TritonPagedBackend(HeadCounts(1, 1, 64), Placement(device, torch.bfloat16)).begin_step(
            kv, build_metadata([request], [query_len], 16, device)
        )
        query = torch.full((query_len, 1, 64), 1e30, dtype=torch.bfloat16, device=device)
        found = step.attend(1, query, torch.zeros(query_len, 2, 64, dtype=torch.bfloat16, device=device))
        assert found.eq(7.0).all()


def test_rounding_to_fp8_is_that_of_torch() -> None:
    device = triton_device()
    from folovllm.worker_proc.kernels.triton.cache_write import CacheLayer, write_to_cache

    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = codes[codes.isfinite()].sort().values
    between = (numbers[1:] + numbers[:-1]) / 2  # ties
    others = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * torch.linspace(-12, 9, 1000).exp2()
    values = torch.cat((numbers, between, between * 1.001, others, torch.tensor([1e9, -1e9, torch.inf])))
    if device.type == "cuda":  # the interpreter's conversion makes a number of it
        values = torch.cat((values, torch.tensor([torch.nan])))
    rows = torch.nn.functional.pad(values, (0, -len(values) % 64)).view(-1, 1, 64).to(device)
    new = torch.cat((rows, -rows), dim=1)  # one K head and one V head
    stored = torch.zeros(2, 1, 1, len(rows), 64, dtype=torch.float8_e4m3fn, device=device)
    write_to_cache(new, CacheLayer(stored, torch.ones(2, 1, device=device)), torch.arange(len(rows), device=device), 0)
    expected = new.transpose(0, 1)[:, None, None].clamp(-448, 448).to(torch.float8_e4m3fn)
    torch.testing.assert_close(stored.float(), expected.float(), atol=0, rtol=0, equal_nan=True)

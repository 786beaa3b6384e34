"""Triton's attention against the reference, on steps of every shape; on the GPU, or in Triton's interpreter."""

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

"""The FlashAttention package that is installed, against the reference, on steps of every shape."""

import pytest
import torch

from folovllm.worker_proc.attention.backend import AttentionBackend
from folovllm.worker_proc.attention.flash_attn import FlashAttnBackend, what_is_missing
from folovllm.worker_proc.attention.torch_naive import TorchNaiveBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kv_tensors import KVTensors
from tests.fakes.attention import PagedRequest, build_metadata, model_config, scattered_blocks

pytestmark = pytest.mark.gpu

BLOCK_SIZE = 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(1, 1, 64), (4, 2, 96), (16, 8, 128), (8, 1, 256)])
@pytest.mark.parametrize(
    ("contexts", "query_lens"),
    [([0], [1]), ([255, 256, 257, 5000], [1] * 4), ([511, 3, 0, 200, 256, 0], [1, 1, 5, 60, 256, 700])],
)
def test_as_the_reference(
    contexts: list[int], query_lens: list[int], heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    num_q_heads, num_kv_heads, head_dim = heads
    placement = Placement(torch.device("cuda"), dtype)
    package, missing = what_is_missing(placement, BLOCK_SIZE, head_dim)
    if package is None or missing:
        pytest.skip(f"flash_attn needs {', and '.join(missing)}")
    lengths = [context + length for context, length in zip(contexts, query_lens, strict=True)]
    blocks, num_blocks = scattered_blocks(lengths, BLOCK_SIZE)
    requests = [PagedRequest(owned, context) for owned, context in zip(blocks, contexts, strict=True)]
    metadata = build_metadata(requests, query_lens, BLOCK_SIZE, placement.device)
    generator = torch.Generator().manual_seed(4)
    flat = torch.randn(sum(query_lens), num_q_heads + 2 * num_kv_heads, head_dim, generator=generator)
    flat = flat.to(placement.device, dtype)
    config = model_config(num_kv_heads, head_dim)
    caches = [KVTensors(config, num_blocks, BLOCK_SIZE, placement) for _ in range(2)]
    caches[0].data.copy_(torch.randn(caches[0].data.shape, generator=generator))
    caches[1].data.copy_(caches[0].data)
    backends: tuple[AttentionBackend, ...] = (TorchNaiveBackend(), FlashAttnBackend(package))
    outputs = [
        backend.begin_step(cache, metadata).attend(1, flat[:, :num_q_heads], flat[:, num_q_heads:]).float()
        for backend, cache in zip(backends, caches, strict=True)
    ]
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-2, rtol=2e-2)
    assert torch.equal(caches[0].data, caches[1].data)

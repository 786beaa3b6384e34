"""The flash_attn backend's calls, against packages that compute in plain torch; and what keeps it from being used."""

import pathlib
import sys
from collections.abc import Callable

import pytest
import torch

from folovllm.worker_proc.attention.backend import AttentionBackend
from folovllm.worker_proc.attention.flash_attn import (
    FlashAttention2,
    FlashAttention3,
    FlashAttnBackend,
    VarlenAttention,
    find_package,
    what_is_missing,
)
from folovllm.worker_proc.attention.torch_naive import TorchNaiveBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kv_tensors import KVTensors
from tests.fakes.attention import PagedRequest, build_metadata, model_config, scattered_blocks
from tests.fakes.flash_attention import flash_attn_varlen_func, flash_attn_with_kvcache

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
VERSION_2 = FlashAttention2(flash_attn_varlen_func)
VERSION_3 = FlashAttention3(flash_attn_with_kvcache)
TWO = "from tests.fakes.flash_attention import flash_attn_varlen_func\n"
THREE = "from tests.fakes.flash_attention import flash_attn_with_kvcache\n"


@pytest.mark.parametrize("package", [VERSION_2, VERSION_3], ids=lambda package: package.name)
@pytest.mark.parametrize(
    ("contexts", "query_lens"),
    [
        ([0], [1]),
        ([255, 256, 257], [1, 1, 1]),
        ([0, 300], [7, 300]),
        ([511, 3, 0, 200, 256], [1, 1, 5, 60, 256]),
    ],
)
@pytest.mark.parametrize("heads", [(4, 2, 64), (3, 1, 16), (2, 2, 96)])
def test_the_results_are_those_of_the_reference(
    package: VarlenAttention, contexts: list[int], query_lens: list[int], heads: tuple[int, int, int]
) -> None:
    """Layout, ends, block tables and the alignment of the causal mask: decodes and chunks in one call."""
    num_q_heads, num_kv_heads, head_dim = heads
    lengths = [context + length for context, length in zip(contexts, query_lens, strict=True)]
    blocks, num_blocks = scattered_blocks(lengths, 256)
    requests = [PagedRequest(owned, context) for owned, context in zip(blocks, contexts, strict=True)]
    metadata = build_metadata(requests, query_lens, 256)
    generator = torch.Generator().manual_seed(4)
    flat = torch.randn(sum(query_lens), num_q_heads + 2 * num_kv_heads, head_dim, generator=generator)
    config = model_config(num_kv_heads, head_dim)
    caches = [KVTensors(config, num_blocks, 256, Placement(CPU, torch.float32)) for _ in range(2)]
    caches[0].data.copy_(torch.randn(caches[0].data.shape, generator=generator))
    caches[1].data.copy_(caches[0].data)
    backends: tuple[AttentionBackend, ...] = (TorchNaiveBackend(), FlashAttnBackend(package))
    outputs = [
        backend.begin_step(cache, metadata).attend(1, flat[:, :num_q_heads], flat[:, num_q_heads:])
        for backend, cache in zip(backends, caches, strict=True)
    ]
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-5, rtol=2e-5)
    assert torch.equal(caches[0].data, caches[1].data)


def test_the_cache_is_read_where_it_lies() -> None:
    kv = KVTensors(model_config(2, 16), 3, 256, Placement(CPU, torch.float32))
    seen = []

    def function(_query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **_options: object) -> torch.Tensor:
        seen.extend([keys, values])
        return torch.zeros(1, 4, 16)

    metadata = build_metadata([PagedRequest([2])], [1], 256)
    step = FlashAttnBackend(FlashAttention2(function)).begin_step(kv, metadata)
    assert step.attend(1, torch.ones(1, 4, 16), torch.ones(1, 4, 16)).shape == (1, 64)
    assert [tensor.shape for tensor in seen] == [(3, 256, 2, 16)] * 2
    assert [tensor.data_ptr() for tensor in seen] == [kv.layer(1)[0].data_ptr(), kv.layer(1)[1].data_ptr()]


# ---- which package, and whether it can be used -----------------------------------------------------------------------


@pytest.fixture
def install(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Makes a module importable; none of the known ones is before."""
    for module in ("flash_attn", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    others = [path for path in sys.path if not (pathlib.Path(path) / "flash_attn").exists()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *others])

    def write(module: str, source: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return write


def test_the_newer_package_comes_first(install: Callable[[str, str], None]) -> None:
    install("flash_attn", TWO)
    package, _ = find_package()
    assert isinstance(package, FlashAttention2) and package.block_multiple == 256
    install("flash_attn_interface", THREE)
    package, _ = find_package()
    assert isinstance(package, FlashAttention3) and package.block_multiple == 1


def test_without_a_package_the_modules_are_named(install: Callable[[str, str], None]) -> None:
    assert find_package() == (None, "neither module flash_attn nor flash_attn_interface is installed")


def test_a_package_that_cannot_be_imported_is_told_and_the_other_taken(install: Callable[[str, str], None]) -> None:
    install("flash_attn_interface", "raise ImportError('undefined symbol: _ZN3c10')\n")
    package, cause = find_package()
    assert package is None
    assert cause == "flash_attn_interface is installed and cannot be imported: undefined symbol: _ZN3c10"
    install("flash_attn", TWO)
    assert isinstance(find_package()[0], FlashAttention2)
    install("flash_attn", "")
    assert find_package()[1].endswith("; flash_attn is installed and has no flash_attn_varlen_func")


def test_everything_that_is_missing_is_named(install: Callable[[str, str], None]) -> None:
    _, missing = what_is_missing(Placement(CPU, torch.float32), 16, 320)
    assert missing == [
        "a CUDA device (this is cpu)",
        "the package flash-attn (neither module flash_attn nor flash_attn_interface is installed)",
        "dtype bfloat16 or float16 (it is float32)",
        "heads of at most 256 numbers (they have 320)",
    ]
    install("flash_attn", TWO)
    _, missing = what_is_missing(Placement(CPU, torch.bfloat16), 16, 128)
    assert missing[1:] == ["a block_size that is a multiple of 256 (it is 16)"]


@pytest.mark.parametrize(
    ("source", "block_size", "capability", "fits"),
    [
        (("flash_attn", TWO), 256, (8, 0), True),
        (("flash_attn", TWO), 512, (9, 0), True),
        (("flash_attn", TWO), 128, (9, 0), False),
        (("flash_attn", TWO), 256, (7, 5), False),
        (("flash_attn_interface", THREE), 16, (9, 0), True),
    ],
)
def test_on_a_gpu_it_depends_on_block_size_and_card(
    source: tuple[str, str],
    block_size: int,
    capability: tuple[int, int],
    fits: bool,
    install: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(*source)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    _, missing = what_is_missing(Placement(CUDA, torch.bfloat16), block_size, 128)
    assert (missing == []) is fits

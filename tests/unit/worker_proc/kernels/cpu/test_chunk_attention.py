"""The compiled kernel for chunks against the reference, in every form that this processor has."""

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("llvmlite", reason="kernels for the CPU are compiled by llvmlite")

import llvmlite.binding as llvm

from folovllm.worker_proc.attention.backend import AttentionMetadata
from folovllm.worker_proc.attention.paged import PagedBackend
from folovllm.worker_proc.attention.torch_naive import TorchNaiveBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kernels.cpu import chunk_attention
from folovllm.worker_proc.kernels.cpu.chunk_attention import (
    MAX_VECTORS,
    Chunk,
    ChunkAttention,
    allow_tiles,
    chunks_of,
    cut_into_tiles,
)
from folovllm.worker_proc.kernels.cpu.chunk_products import Form, best_form
from folovllm.worker_proc.kernels.cpu.code_cache import CodeCache
from folovllm.worker_proc.kernels.cpu.compiled import prepare
from folovllm.worker_proc.kernels.cpu.decode_attention import HeadShape
from folovllm.worker_proc.kernels.cpu.team import find_team
from folovllm.worker_proc.kv_tensors import KVTensors
from tests.fakes.attention import PagedRequest, build_metadata, model_config, scattered_blocks

SMOLLM = HeadShape(3, 3, 64, 16, "bfloat16")
KERNELS = [
    (SMOLLM, Form.AMX),
    (SMOLLM, Form.PAIRS),
    (SMOLLM, Form.FLOATS),
    (HeadShape(1, 8, 128, 32, "bfloat16"), Form.AMX),
    (HeadShape(2, 2, 32, 48, "bfloat16"), Form.PAIRS),
    (HeadShape(1, 4, 256, 16, "bfloat16"), Form.AMX),
    (HeadShape(2, 1, 32, 16, "float16"), Form.FLOATS),
]
FEATURE = {Form.AMX: "amx-bf16", Form.PAIRS: "avx512bf16"}


def compiled(shape: HeadShape, form: Form | None = None, cache: CodeCache | None = None) -> ChunkAttention:
    team = find_team()
    if team is None:
        pytest.skip("this torch does not use GNU's OpenMP")
    if form in FEATURE and not llvm.get_host_cpu_features().get(FEATURE[form]):
        pytest.skip(f"this processor has no {FEATURE[form]}")
    prepare()
    kernel = ChunkAttention(shape, team, cache, form=form)
    if form is not None and kernel.form is not form:
        pytest.skip("this system does not allow tiles")
    return kernel


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CodeCache:
    return CodeCache(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module", params=KERNELS, ids=lambda pair: f"{pair[1].value}-{pair[0]}")
def kernel(request: pytest.FixtureRequest, cache: CodeCache) -> ChunkAttention:
    shape, form = request.param
    return compiled(shape, form, cache)


@pytest.fixture(scope="module")
def smollm(cache: CodeCache) -> ChunkAttention:
    return compiled(SMOLLM, cache=cache)


@dataclasses.dataclass
class Step:
    """A step's tokens over a cache full of random numbers; what lies past a request's end is not a number."""

    kv: KVTensors
    metadata: AttentionMetadata
    query: torch.Tensor
    key_and_value: torch.Tensor

    def reference(self) -> torch.Tensor:
        return TorchNaiveBackend().begin_step(self.kv, self.metadata).attend(1, self.query, self.key_and_value)

    def attend(self, kernel: ChunkAttention) -> torch.Tensor:
        """After `reference`, which has written the step's tokens to the cache."""
        output = torch.full((self.query.shape[0], self.query.shape[1] * self.query.shape[2]), 7.0).to(self.query.dtype)
        kernel.plan(self.metadata, self.kv.layer(1)).attend(self.query, self.kv.layer(1), output)
        return output


def make_step(shape: HeadShape, contexts: Sequence[int], lengths: Sequence[int], seed: int = 0) -> Step:
    dtype = getattr(torch, shape.kind)
    ends = [context + length for context, length in zip(contexts, lengths, strict=True)]
    blocks, num_blocks = scattered_blocks(ends, shape.block_size, seed)
    requests = [PagedRequest(owned, context) for owned, context in zip(blocks, contexts, strict=True)]
    metadata = build_metadata(requests, lengths, shape.block_size)
    placement = Placement(torch.device("cpu"), dtype)
    kv = KVTensors(model_config(shape.num_kv_heads, shape.head_dim), num_blocks, shape.block_size, placement)
    generator = torch.Generator().manual_seed(seed)
    kv.data.copy_(torch.randn(kv.data.shape, generator=generator))
    for owned, end in zip(blocks, ends, strict=True):
        if end % shape.block_size:
            kv.data[:, :, :, owned[-1], end % shape.block_size :] = math.nan
    num_heads = shape.num_kv_heads * shape.group
    heads = torch.randn(sum(lengths), num_heads + 2 * shape.num_kv_heads, shape.head_dim, generator=generator)
    return Step(kv, metadata, heads.to(dtype)[:, :num_heads], heads.to(dtype)[:, num_heads:])


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.float() - right.float()).norm() / right.float().norm())


@pytest.mark.parametrize(
    ("contexts", "lengths"),
    [
        ([0, 0, 0, 0, 0], [2, 15, 16, 17, 33]),
        ([1, 15, 16, 17, 31], [2, 3, 16, 5, 2]),
        ([127, 126, 128, 130], [2, 2, 2, 100]),
        ([600], [45]),
        ([0], [200]),
        ([5, 300, 0, 90, 40, 7], [1, 1, 30, 64, 2, 121]),  # the first two decode: not the kernel's
    ],
)
def test_it_is_attention(kernel: ChunkAttention, contexts: list[int], lengths: list[int]) -> None:
    step = make_step(kernel.shape, contexts, lengths)
    right, found = step.reference(), step.attend(kernel)
    decodes = step.metadata.num_decodes
    assert (found[:decodes] == 7.0).all()
    assert found[decodes:].isfinite().all()
    assert error(found[decodes:], right[decodes:]) < (4e-3 if kernel.shape.kind == "bfloat16" else 1e-3)
    assert (found[decodes:].float() - right[decodes:].float()).abs().max() < 0.02 * right.float().abs().max()


def test_one_plan_serves_all_layers(kernel: ChunkAttention) -> None:
    step = make_step(kernel.shape, [20], [40])
    right = step.reference()
    plan = kernel.plan(step.metadata, step.kv.layer(0))
    for _ in range(2):
        output = torch.empty_like(right)
        plan.attend(step.query, step.kv.layer(1), output)
        assert error(output, right) < 4e-3


def test_a_request_comes_out_the_same_alone_and_in_company(kernel: ChunkAttention) -> None:
    contexts, lengths = [150, 0, 33, 260], [40, 200, 2, 9]
    step = make_step(kernel.shape, contexts, lengths)
    step.reference()
    together = step.attend(kernel)
    start = 0
    for row, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        tokens = slice(start, start + length)
        table = step.metadata.block_table[row : row + 1]
        lens = torch.tensor([context + length])
        alone = AttentionMetadata([length], [context + length], 0, table, step.metadata.slot_mapping[tokens], lens)
        output = torch.empty_like(together[tokens])
        kernel.plan(alone, step.kv.layer(1)).attend(step.query[tokens], step.kv.layer(1), output)
        assert torch.equal(output, together[tokens])
        start += length


def test_a_prompt_comes_out_the_same_whole_and_in_chunks(kernel: ChunkAttention) -> None:
    step = make_step(kernel.shape, [0], [300])
    step.reference()
    whole = step.attend(kernel)
    for start, end in ((0, 17), (17, 128), (128, 255), (255, 300)):
        chunk = AttentionMetadata(
            [end - start], [end], 0, step.metadata.block_table, step.metadata.slot_mapping[start:end], torch.tensor(end)
        )
        output = torch.empty_like(whole[start:end])
        kernel.plan(chunk, step.kv.layer(1)).attend(step.query[start:end], step.kv.layer(1), output)
        assert torch.equal(output, whole[start:end])


def test_scores_far_apart_neither_overflow_nor_vanish(smollm: ChunkAttention) -> None:
    step = make_step(SMOLLM, [200], [40])
    step.query = step.query * 60
    right = step.reference()
    assert error(step.attend(smollm), right) < 8e-3


def test_what_is_not_a_number_shows_in_rows_that_see_it_alone(smollm: ChunkAttention) -> None:
    step = make_step(SMOLLM, [40, 0], [20, 20])
    step.reference()
    clean = step.attend(smollm)
    first_block = int(step.metadata.block_table[0, 0])
    step.kv.layer(1)[0, :, first_block, 3] = math.nan
    found = step.attend(smollm)
    assert found[:20].isnan().all()
    assert torch.equal(found[20:], clean[20:])


def test_queries_whose_heads_are_apart_are_brought_together(smollm: ChunkAttention) -> None:
    step = make_step(SMOLLM, [20], [9])
    step.reference()
    expected = step.attend(smollm)
    apart = torch.empty(9, SMOLLM.head_dim, step.query.shape[1], dtype=step.query.dtype).transpose(1, 2)
    step.query = apart.copy_(step.query)
    assert torch.equal(step.attend(smollm), expected)


def test_products_of_torch_are_right_after_the_kernel_has_used_tiles(smollm: ChunkAttention) -> None:
    left, right = (torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (1, 2))
    expected = left @ right
    step = make_step(SMOLLM, [100], [40])
    step.reference()
    for _ in range(3):
        step.attend(smollm)
        assert torch.equal(left @ right, expected)


def test_the_backend_sends_chunks_to_the_kernel_and_decodes_elsewhere(smollm: ChunkAttention) -> None:
    step = make_step(SMOLLM, [30, 16, 0, 50], [1, 1, 40, 7])
    step.kv.data.nan_to_num_()
    right = step.reference()
    backend = PagedBackend(9, chunk_kernel=lambda: smollm)
    found = backend.begin_step(step.kv, step.metadata).attend(1, step.query, step.key_and_value)
    assert error(found, right) < 6e-3


def test_chunks_are_the_requests_that_do_not_decode() -> None:
    step = make_step(SMOLLM, [30, 16, 0, 50], [1, 1, 40, 7])
    assert chunks_of(step.metadata) == [Chunk(2, 40, 0, 2), Chunk(42, 7, 50, 3)]


@pytest.mark.parametrize("length", [2, 16, 40, 130, 1000])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_tiles_cover_every_row_once(length: int, threads: int) -> None:
    chunks = [Chunk(3, length, 77, 1), Chunk(3 + length, 5, 0, 2)]
    tiles = cut_into_tiles(SMOLLM, chunks, threads)
    for chunk in chunks:
        own = tiles[tiles[:, 6] == chunk.request]
        assert (own[:, 1] == chunk.start).all() and (own[:, 5] == chunk.context).all()
        for head in range(3):
            rows = sorted(
                first + row for _, _, first, vectors, *_ in own[own[:, 0] == head] for row in range(16 * vectors)
            )
            assert rows == list(range(-(-chunk.length * 3 // 16) * 16))
    assert tiles[:, 3].max() <= MAX_VECTORS


def test_tiles_are_divided_where_threads_would_go_without() -> None:
    one_head = HeadShape(1, 1, 64, 16, "bfloat16")
    assert len(cut_into_tiles(one_head, [Chunk(0, 128, 1000, 0)], 1)) == 1
    assert len(cut_into_tiles(one_head, [Chunk(0, 128, 1000, 0)], 2)) == 2
    assert len(cut_into_tiles(one_head, [Chunk(0, 16, 1000, 0)], 2)) == 1


def test_the_costliest_tiles_come_first() -> None:
    tiles = cut_into_tiles(SMOLLM, [Chunk(0, 2000, 0, 0)], 2)
    rows_times_keys = [vectors * (first + 16 * vectors) for _, _, first, vectors, *_ in tiles.tolist()]
    assert rows_times_keys[0] == max(rows_times_keys)
    assert tiles[-3:, 2].tolist() == [0, 0, 0]


def test_the_fastest_form_a_processor_has() -> None:
    pairs = {"avx512f": True, "avx512bf16": True, "amx-bf16": False}
    everything = {**pairs, "amx-bf16": True}
    assert best_form("bfloat16", "emeraldrapids", everything) is Form.AMX
    assert best_form("bfloat16", "znver4", pairs) is Form.PAIRS
    assert best_form("bfloat16", "cooperlake", pairs) is Form.FLOATS
    assert best_form("bfloat16", "haswell", {"avx2": True}) is Form.FLOATS
    assert best_form("float16", "znver5", pairs) is best_form("float16", "emeraldrapids", everything) is Form.FLOATS


def test_a_system_that_does_not_allow_tiles_gets_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_attention, "best_form", lambda *_: Form.AMX)
    monkeypatch.setattr(chunk_attention, "allow_tiles", lambda: False)
    assert compiled(HeadShape(1, 1, 32, 16, "bfloat16")).form is Form.FLOATS


@pytest.mark.skipif(not llvm.get_host_cpu_features().get("amx-tile"), reason="this processor has no AMX")
def test_tiles_may_be_asked_for_again_and_again() -> None:
    assert allow_tiles() == allow_tiles()

"""Steps of many rows in one call against the network's own operators in float32 and bf16, in every form there is."""

import pathlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("llvmlite", reason="kernels for the CPU are compiled by llvmlite")

import llvmlite.binding as llvm

from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.attention.paged import PagedBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kernels.cpu import wide_step
from folovllm.worker_proc.kernels.cpu.chunk_attention import ChunkAttention, allow_tiles
from folovllm.worker_proc.kernels.cpu.chunk_products import Form
from folovllm.worker_proc.kernels.cpu.compiled import prepare
from folovllm.worker_proc.kernels.cpu.decode_attention import DecodeAttention, HeadShape
from folovllm.worker_proc.kernels.cpu.network import FEW_ROWS, CompiledNetwork, plan_network
from folovllm.worker_proc.kernels.cpu.team import find_team
from folovllm.worker_proc.kernels.cpu.wide_step import wide_form
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.models.registry import CausalLM, build_model
from folovllm.worker_proc.weights import load_weights
from tests.fakes.attention import PagedRequest, build_metadata, positions_of, scattered_blocks
from tests.fakes.blocked import block_network, linears_of
from tests.fakes.tiny_models import MAX_POSITIONS, VOCAB_SIZE, make_model

BLOCK_SIZE = 16
CPU = torch.device("cpu")
FEATURES = {Form.AMX: "amx-bf16", Form.PAIRS: "avx512bf16"}

# All sizes are whole tiles, none of them the same.
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"head_dim": 32, "attention_bias": True, "mlp_bias": True}),
    ("qwen2", {"head_dim": 32, "tie_word_embeddings": True, "intermediate_size": 160}),
    ("qwen3", {"head_dim": 64, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96}),
]

# New tokens of each request, decodes first; then the next step of the same requests.
STEPS = [[40, 1, 15, 47, 3, 16, 2], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 18, 2, 33], [1, 5, 1, 1, 1, 1, 1]]


@pytest.fixture(params=list(FEATURES))
def form(request: pytest.FixtureRequest) -> Form:
    form: Form = request.param
    if not llvm.get_host_cpu_features().get(FEATURES[form]) or (form is Form.AMX and not allow_tiles()):
        pytest.skip(f"this processor has no {FEATURES[form]}")
    return form


class Side:
    """A network of one type with its cache, and requests as far as they have come."""

    def __init__(self, folder: pathlib.Path, dtype: torch.dtype) -> None:
        self.config = read_model_config(folder)
        placement = Placement(CPU, dtype)
        self.model: CausalLM = build_model(self.config, placement, MAX_POSITIONS)
        row_major = {id(layer): layer.weight for layer in linears_of(self.model.parts())}
        load_weights(self.model, folder)
        self.memories = block_network(self.model.parts(), row_major)
        lengths = [sum(column) for column in zip(*STEPS, strict=True)]
        blocks, num_blocks = scattered_blocks(lengths, BLOCK_SIZE)
        self.requests = [PagedRequest(owned) for owned in blocks]
        self.kv = KVTensors(self.config, num_blocks, BLOCK_SIZE, placement)
        self.backend = PagedBackend(self.config.num_attention_heads)
        self.network: CompiledNetwork | None = None

    def compile(self, form: Form) -> None:
        team = find_team()
        if team is None:
            pytest.skip("this torch does not use GNU's OpenMP")
        prepare()
        config = self.config
        group = config.num_attention_heads // config.num_key_value_heads
        shape = HeadShape(config.num_key_value_heads, group, config.head_dim, BLOCK_SIZE, "bfloat16")
        plan = plan_network(self.model.parts(), self.kv, config.num_attention_heads)
        assert plan is not None
        attention, chunks = DecodeAttention(shape, team), ChunkAttention(shape, team)
        self.network = CompiledNetwork(plan, attention, chunks, self.kv, team, None, form=form)

    def step(self, tokens: torch.Tensor, query_lens: Sequence[int], members: Sequence[int]) -> torch.Tensor:
        """Logits [T, vocabulary] in float32 of the next tokens of some requests, which are further afterwards."""
        requests = [self.requests[member] for member in members]
        metadata, positions = build_metadata(requests, query_lens, BLOCK_SIZE), positions_of(requests, query_lens)
        ids = torch.cat(
            [
                tokens[member, request.num_computed : request.num_computed + length]
                for member, request, length in zip(members, requests, query_lens, strict=True)
            ]
        )
        if self.network is None:
            hidden = self.model.forward(ids, positions, self.backend.begin_step(self.kv, metadata))
            logits = self.model.compute_logits(hidden).float()
        else:
            computed = self.network.forward(ids, positions, metadata)
            assert computed is not None
            found = self.network.logits(computed)
            assert found is not None
            logits = found
        for request, length in zip(requests, query_lens, strict=True):
            request.num_computed += length
        return logits


def decodes_first(query_lens: Sequence[int]) -> list[int]:
    return sorted(range(len(query_lens)), key=lambda member: query_lens[member] != 1)


def random_tokens() -> torch.Tensor:
    longest = max(sum(column) for column in zip(*STEPS, strict=True))
    return torch.randint(0, VOCAB_SIZE, (len(STEPS[0]), longest), generator=torch.Generator().manual_seed(1))


def side(folder: pathlib.Path, dtype: torch.dtype, form: Form | None = None) -> Side:
    made = Side(folder, dtype)
    if form is not None:
        made.compile(form)
    return made


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_steps_are_nearer_to_float32_than_torchs(
    tmp_path: pathlib.Path, form: Form, family: str, changes: dict[str, Any]
) -> None:
    make_model(tmp_path, family, dtype=torch.bfloat16, **changes)
    with torch.inference_mode():
        exact, plain, compiled = (
            side(tmp_path, torch.float32),
            side(tmp_path, torch.bfloat16),
            side(tmp_path, torch.bfloat16, form),
        )
        tokens, errors = random_tokens(), []
        for query_lens in STEPS:
            members = decodes_first(query_lens)
            lens = [query_lens[member] for member in members]
            expected = exact.step(tokens, lens, members)
            errors.append([error(each.step(tokens, lens, members), expected) for each in (compiled, plain)])
            for each in (compiled, plain):
                each.kv.data.copy_(exact.kv.data)  # so that the next step's error is its own
    of_kernels, of_torch = (sum(column) / len(errors) for column in zip(*errors, strict=True))
    assert of_kernels < 1e-2
    assert of_kernels < 1.1 * of_torch


def test_a_request_does_not_depend_on_the_others(tmp_path: pathlib.Path, form: Form) -> None:
    make_model(tmp_path, FAMILIES[0][0], dtype=torch.bfloat16, **FAMILIES[0][1])
    with torch.inference_mode():
        tokens, everyone = random_tokens(), range(len(STEPS[0]))
        together, alone = (side(tmp_path, torch.bfloat16, form) for _ in range(2))
        both = together.step(tokens, [6] * len(everyone), everyone)
        one = alone.step(tokens, [6], [3])
        assert torch.equal(both[18:24], one)
        together.kv.data[:, :, :, together.requests[1].blocks[0], :1] = float("nan")
        both = together.step(tokens, [1] * len(everyone), everyone)
        assert both[1].isnan().all() and not both[[0, 2, 3, 4, 5, 6]].isnan().any()


def test_rows_shared_among_threads_come_out_as_outputs_do(
    tmp_path: pathlib.Path, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last slices are shorter, or empty."""
    make_model(tmp_path, FAMILIES[2][0], dtype=torch.bfloat16, **FAMILIES[2][1])
    with torch.inference_mode():
        tokens, by_outputs = random_tokens(), side(tmp_path, torch.bfloat16, form)
        monkeypatch.setattr(wide_step, "CUT_FROM", 1)
        monkeypatch.setattr(wide_step, "SLICE_BYTES", 7_000)  # several slices for each thread, of one tile and of two
        by_rows = side(tmp_path, torch.bfloat16, form)
        for query_lens in ([40, 1, 15, 47, 3, 16, 2], [1, 1, 1, 1, 18, 2, 33], [5, 5, 5, 5, 5, 5, 5]):
            members = decodes_first(query_lens)
            lens = [query_lens[member] for member in members]
            found = by_rows.step(tokens, lens, members)
            assert torch.equal(found, by_outputs.step(tokens, lens, members))
            assert torch.equal(by_rows.kv.data, by_outputs.kv.data)


def test_few_decodes_go_the_way_of_few_rows(tmp_path: pathlib.Path, form: Form) -> None:
    """They come out the same, whether there is code for many rows or not."""
    make_model(tmp_path, FAMILIES[0][0], dtype=torch.bfloat16, **FAMILIES[0][1])
    with torch.inference_mode():
        tokens, wide = random_tokens(), side(tmp_path, torch.bfloat16, form)
        members = range(FEW_ROWS)
        wide.step(tokens, [6] * FEW_ROWS, members)
        before = wide.kv.data.clone()
        found = wide.step(tokens, [1] * FEW_ROWS, members)
        wide.kv.data.copy_(before)
        for request in wide.requests[:FEW_ROWS]:
            request.num_computed -= 1
        for member in members:
            assert torch.equal(wide.step(tokens, [1], [member])[0], found[member])


def test_networks_without_whole_tiles_compute_few_rows_alone(tmp_path: pathlib.Path, form: Form) -> None:
    make_model(tmp_path, "llama", dtype=torch.bfloat16, head_dim=32, intermediate_size=112)
    with torch.inference_mode():
        narrow = side(tmp_path, torch.bfloat16, form)
        assert narrow.network is not None
        requests = narrow.requests[: FEW_ROWS + 1]
        lens = [1] * len(requests)
        metadata, ids = build_metadata(requests, lens, BLOCK_SIZE), torch.zeros(len(requests), dtype=torch.int64)
        assert narrow.network.forward(ids, positions_of(requests, lens), metadata) is None
        few = build_metadata(requests[:1], [1], BLOCK_SIZE)
        assert narrow.network.forward(ids[:1], positions_of(requests[:1], [1]), few) is not None
        hidden = torch.zeros(FEW_ROWS + 1, narrow.config.hidden_size, dtype=torch.bfloat16)
        assert narrow.network.logits(hidden) is None


def test_the_form_is_the_processors() -> None:
    assert wide_form(tiles_allowed=True) is Form.AMX
    pairs = llvm.get_host_cpu_features().get("avx512bf16")
    assert wide_form(tiles_allowed=False) is (Form.PAIRS if pairs else None)

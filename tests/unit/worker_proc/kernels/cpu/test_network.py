"""Whole steps in one call against the network's own operators in float32 and 16 bits, for every family."""

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("llvmlite", reason="kernels for the CPU are compiled by llvmlite")

from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.attention.backend import AttentionMetadata
from folovllm.worker_proc.attention.paged import PagedBackend
from folovllm.worker_proc.device import Placement, dtype_name
from folovllm.worker_proc.kernels.cpu.chunk_attention import ChunkAttention
from folovllm.worker_proc.kernels.cpu.compiled import prepare
from folovllm.worker_proc.kernels.cpu.decode_attention import DecodeAttention, HeadShape
from folovllm.worker_proc.kernels.cpu.network import CompiledNetwork, plan_network
from folovllm.worker_proc.kernels.cpu.team import find_team
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.models.registry import CausalLM, build_model
from folovllm.worker_proc.weights import load_weights
from tests.fakes.attention import PagedRequest, build_metadata, positions_of, scattered_blocks
from tests.fakes.blocked import block_network, linears_of
from tests.fakes.tiny_models import MAX_POSITIONS, VOCAB_SIZE, make_model

BLOCK_SIZE = 16
CPU = torch.device("cpu")
PROMPTS = [30, 1, 15, 47]  # the second token from here on opens a block, the first ends one, and so on
NUM_STEPS = 5

# Sizes: nothing is a multiple of 64 but the hidden size of the first.
FAMILIES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("llama", torch.bfloat16, {"head_dim": 32}),
    ("llama", torch.bfloat16, {"head_dim": 64, "attention_bias": True, "mlp_bias": True, "hidden_size": 80}),
    ("qwen2", torch.bfloat16, {"head_dim": 32, "tie_word_embeddings": True, "intermediate_size": 112}),
    ("qwen3", torch.bfloat16, {"head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 2}),
    ("qwen3", torch.float16, {"head_dim": 32, "tie_word_embeddings": True}),
]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Side:
    """A network of one type with its cache, and the requests as far as they have come."""

    def __init__(self, folder: pathlib.Path, dtype: torch.dtype) -> None:
        self.config = read_model_config(folder)
        placement = Placement(CPU, dtype)
        self.model: CausalLM = build_model(self.config, placement, MAX_POSITIONS)
        linears = linears_of(self.model.parts())
        row_major = {id(layer): layer.weight for layer in linears}
        load_weights(self.model, folder)
        self.memories = block_network(self.model.parts(), row_major)
        blocks, num_blocks = scattered_blocks([length + NUM_STEPS for length in PROMPTS], BLOCK_SIZE)
        self.requests = [PagedRequest(owned) for owned in blocks]
        self.kv = KVTensors(self.config, num_blocks, BLOCK_SIZE, placement)
        self.backend = PagedBackend(self.config.num_attention_heads)

    def network(self) -> CompiledNetwork:
        team = find_team()
        if team is None:
            pytest.skip("this torch does not use GNU's OpenMP")
        prepare()
        config = self.config
        group = config.num_attention_heads // config.num_key_value_heads
        kind = dtype_name(self.kv.data.dtype)
        shape = HeadShape(config.num_key_value_heads, group, config.head_dim, BLOCK_SIZE, kind)
        plan = plan_network(self.model.parts(), self.kv, config.num_attention_heads)
        assert plan is not None
        attention, chunks = DecodeAttention(shape, team), ChunkAttention(shape, team)
        return CompiledNetwork(plan, attention, chunks, self.kv, team, None)

    def prefill(self, tokens: torch.Tensor) -> None:
        """`tokens`: [requests, longest]."""
        metadata = build_metadata(self.requests, PROMPTS, BLOCK_SIZE)
        ids = torch.cat([row[:length] for row, length in zip(tokens, PROMPTS, strict=True)])
        step = self.backend.begin_step(self.kv, metadata)
        self.model.forward(ids, positions_of(self.requests, PROMPTS), step)
        for request, length in zip(self.requests, PROMPTS, strict=True):
            request.num_computed += length

    def inputs(self, tokens: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
        """Token ids, positions and metadata of a step of these requests."""
        requests = [self.requests[row] for row in rows]
        ids = torch.stack([tokens[row, self.requests[row].num_computed] for row in rows])
        lens = [1] * len(rows)
        return ids, positions_of(requests, lens), build_metadata(requests, lens, BLOCK_SIZE)

    def step(self, tokens: torch.Tensor, rows: list[int], network: CompiledNetwork | None = None) -> torch.Tensor:
        """Logits [rows, vocabulary] in float32; the requests are one token further afterwards."""
        ids, positions, metadata = self.inputs(tokens, rows)
        if network is None:
            hidden = self.model.forward(ids, positions, self.backend.begin_step(self.kv, metadata))
            logits = self.model.compute_logits(hidden).float()
        else:
            hidden = forward(network, ids, positions, metadata)
            few = network.logits(hidden)
            assert few is not None
            logits = few
        for row in rows:
            self.requests[row].num_computed += 1
        return logits


def forward(
    network: CompiledNetwork, ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
) -> torch.Tensor:
    hidden = network.forward(ids, positions, metadata)
    assert hidden is not None
    return hidden


def random_tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB_SIZE, (len(PROMPTS), max(PROMPTS) + NUM_STEPS), generator=generator)


def sides(folder: pathlib.Path, family: str, dtype: torch.dtype, changes: dict[str, Any]) -> list[Side]:
    """In float32, by torch in 16 bits, and to be computed by the kernels."""
    with torch.inference_mode(False):
        make_model(folder, family, dtype=dtype, **changes)
    return [Side(folder, torch.float32), Side(folder, dtype), Side(folder, dtype)]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("family", "dtype", "changes"), FAMILIES)
def test_steps_are_nearer_to_float32_than_torchs(
    tmp_path: pathlib.Path, family: str, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    exact, plain, compiled = sides(tmp_path, family, dtype, changes)
    tokens, network = random_tokens(), compiled.network()
    for side in (exact, plain, compiled):
        side.prefill(tokens)
    compiled.kv.data.copy_(exact.kv.data)  # so that what follows is the kernels' own
    plain.kv.data.copy_(exact.kv.data)
    errors = []
    for rows in ([0, 1, 2, 3], [3], [2, 0], [1, 2, 3], [0, 1, 2, 3]):
        expected = exact.step(tokens, rows)
        errors.append(
            (error(compiled.step(tokens, rows, network), expected), error(plain.step(tokens, rows), expected))
        )
    of_kernels, of_torch = (sum(column) / len(errors) for column in zip(*errors, strict=True))
    assert of_kernels < (1e-2 if dtype == torch.bfloat16 else 1e-3)
    assert of_kernels < 1.1 * of_torch
    written = exact.kv.data.nonzero(as_tuple=True)
    assert error(compiled.kv.data[written].float(), exact.kv.data[written]) < 1e-2


def test_a_request_does_not_depend_on_the_others(tmp_path: pathlib.Path) -> None:
    _, _, side = sides(tmp_path, *FAMILIES[0])
    tokens, network = random_tokens(), side.network()
    side.prefill(tokens)
    together = forward(network, *side.inputs(tokens, [0, 1, 2, 3]))
    for row in range(4):
        assert torch.equal(forward(network, *side.inputs(tokens, [row]))[0], together[row])
    assert torch.equal(forward(network, *side.inputs(tokens, [3, 1])), together[[3, 1]])
    side.kv.data[:, :, :, side.requests[1].blocks[0], :1] = float("nan")  # its one earlier token's
    spoilt = forward(network, *side.inputs(tokens, [0, 1, 2, 3]))
    assert spoilt[1].isnan().all() and torch.equal(spoilt[[0, 2, 3]], together[[0, 2, 3]])


def test_after_copies_of_blocks_or_other_blocks_with_the_same_content_a_step_is_the_same(
    tmp_path: pathlib.Path,
) -> None:
    """Preemption, prefix hits and copies on write change the block table only."""
    _, _, side = sides(tmp_path, *FAMILIES[0])
    tokens, network = random_tokens(), side.network()
    side.prefill(tokens)
    before = forward(network, *side.inputs(tokens, [3]))
    owned = side.requests[3].blocks
    others = side.requests[0].blocks + side.requests[2].blocks
    side.kv.copy_blocks(torch.tensor(owned[:3]), torch.tensor(others[:3]))
    side.requests[3].blocks = [*others[:3], *owned[3:]]
    assert torch.equal(forward(network, *side.inputs(tokens, [3])), before)


def test_networks_it_cannot_compute_are_known(tmp_path: pathlib.Path) -> None:
    _, side, _ = sides(tmp_path, "llama", torch.bfloat16, {"head_dim": 32, "intermediate_size": 100})
    assert plan_network(side.model.parts(), side.kv, side.config.num_attention_heads) is None
    _, _, side = sides(tmp_path / "other", *FAMILIES[0])
    assert plan_network(side.model.parts(), side.kv, side.config.num_attention_heads) is not None
    linears_of(side.model.parts())[3].blocked = None
    assert plan_network(side.model.parts(), side.kv, side.config.num_attention_heads) is None

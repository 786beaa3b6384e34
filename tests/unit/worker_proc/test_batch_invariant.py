"""`batch_invariant`: the numbers of a request, to the last bit, whatever is computed beside it."""

import pathlib
from collections.abc import Iterator

import msgspec
import pytest
import torch

from folovllm.common.errors import ConfigError
from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.attention.paged import PagedBackend
from folovllm.worker_proc.attention.torch_naive import TorchNaiveBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kernels.cpu.background import CpuKernels
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.layers.linear import in_equal_parts
from folovllm.worker_proc.models.registry import build_model
from folovllm.worker_proc.request_states import RequestStates
from folovllm.worker_proc.startup import choose_graphs, make_invariant
from folovllm.worker_proc.step_arrays import StepLimits
from folovllm.worker_proc.step_graphs import NoGraphs
from folovllm.worker_proc.weights import load_weights
from tests.fakes.attention import PagedRequest, build_metadata, positions_of, scattered_blocks
from tests.fakes.tiny_models import MAX_POSITIONS, VOCAB_SIZE, make_model

pytest.importorskip("llvmlite", reason="kernels for the CPU are compiled by llvmlite")

BLOCK_SIZE = 16
BFLOAT16 = Placement(torch.device("cpu"), torch.bfloat16)
INVARIANT = Placement(torch.device("cpu"), torch.bfloat16, batch_invariant=True)
PROMPTS = [30, 2, 61, 17, 40]
LIMITS = StepLimits(8, MAX_POSITIONS, 256, 20, BLOCK_SIZE, VOCAB_SIZE, VOCAB_SIZE)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_model(
        tmp_path_factory.mktemp("model") / "tiny",
        "llama",
        head_dim=32,
        hidden_size=576,  # what AMX adds up in another order for 33 rows than for 1
        intermediate_size=1536,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )


class Network:
    """Computes steps of some of five requests over one cache."""

    def __init__(self, folder: pathlib.Path) -> None:
        config = read_model_config(folder)
        self.model = build_model(config, INVARIANT, MAX_POSITIONS)
        load_weights(self.model, folder)
        kernels = CpuKernels(config, BLOCK_SIZE, INVARIANT)
        kernels.require()
        self.backend = PagedBackend(config.num_attention_heads, kernels.attention, kernels.chunks)
        self.blocks, num_blocks = scattered_blocks([length + 4 for length in PROMPTS], BLOCK_SIZE)
        self.kv = KVTensors(config, num_blocks, BLOCK_SIZE, INVARIANT)
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, VOCAB_SIZE, (len(PROMPTS), MAX_POSITIONS), generator=generator)

    def logits(self, rows: list[int], num_steps: int = 4) -> list[list[torch.Tensor]]:
        """For each step (the prompts, then tokens one by one) those after each request's last token."""
        self.kv.data.zero_()
        requests = [PagedRequest(self.blocks[row]) for row in rows]
        steps = []
        for lens in ([PROMPTS[row] for row in rows], *([[1] * len(rows)] * (num_steps - 1))):
            metadata = build_metadata(requests, lens, BLOCK_SIZE)
            parts = [
                self.tokens[row, request.num_computed : request.num_computed + length]
                for row, request, length in zip(rows, requests, lens, strict=True)
            ]
            step = self.backend.begin_step(self.kv, metadata)
            hidden = self.model.forward(torch.cat(parts), positions_of(requests, lens), step)
            ends = torch.tensor(lens).cumsum(0) - 1
            steps.append(list(self.model.compute_logits(hidden[ends])))
            for request, length in zip(requests, lens, strict=True):
                request.num_computed += length
        return steps


def test_alone_and_in_company_to_the_last_bit(folder: pathlib.Path) -> None:
    network = Network(folder)
    together = network.logits([0, 1, 2, 3, 4])
    for rows in ([2], [0], [1, 3], [4, 2, 0]):
        for step, expected in zip(network.logits(rows), together, strict=True):
            for row, logits in zip(rows, step, strict=True):
                assert torch.equal(logits, expected[row])


def test_products_of_equal_parts() -> None:
    sizes = []

    def product(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return x * 2

    for rows in (1, 31, 32, 33, 100):
        x = torch.randn(rows, 5)
        assert torch.equal(in_equal_parts(product, x), x * 2)
    assert set(sizes) == {32}


def test_where_it_is_not_to_be_had(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_model_config(folder)
    assert make_invariant(BFLOAT16, config) == INVARIANT
    with pytest.raises(ConfigError, match="this is cpu with float32"):
        make_invariant(Placement(torch.device("cpu"), torch.float32), config)
    with pytest.raises(ConfigError, match="this is cuda"):
        make_invariant(Placement(torch.device("cuda"), torch.bfloat16), config)
    model, kv = build_model(config, INVARIANT, 64), KVTensors(config, 2, BLOCK_SIZE, INVARIANT)
    states = RequestStates(LIMITS, INVARIANT.device)
    graphs = choose_graphs(model, PagedBackend(4), kv, states, CpuKernels(config, BLOCK_SIZE, INVARIANT))
    assert isinstance(graphs, NoGraphs)
    with pytest.raises(ConfigError, match="not 'torch_naive'"):
        choose_graphs(model, TorchNaiveBackend(), kv, states, CpuKernels(config, BLOCK_SIZE, INVARIANT))
    monkeypatch.setenv("FOLOVLLM_CPU_KERNELS", "torch")
    with pytest.raises(ConfigError, match="compiled attention kernels"):
        choose_graphs(model, PagedBackend(4), kv, states, CpuKernels(config, BLOCK_SIZE, INVARIANT))


def test_not_with_quantized_weights(folder: pathlib.Path) -> None:
    config = read_model_config(folder)
    quantized = msgspec.json.decode(b'{"method":"gptq","fields":{}}', type=dict)
    with pytest.raises(ConfigError, match="not quantized"):
        make_invariant(BFLOAT16, msgspec.structs.replace(config, quantization=quantized))

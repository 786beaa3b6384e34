"""The FP8 KV cache on the CPU: its numbers, its scales, and what it does to logits and tokens."""

import dataclasses

import pytest
import torch

from folovllm.common.model_config import ModelConfig, read_model_config
from folovllm.worker_proc.attention.torch_naive import TorchNaiveBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.fp8_cache import LARGEST, LargestHeads, calibrate, dequantize, quantize
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.model_runner import ModelRunner
from folovllm.worker_proc.models.registry import CausalLM
from folovllm.worker_proc.rehearsal import Rehearsal
from folovllm.worker_proc.request_states import RequestStates
from folovllm.worker_proc.startup import rehearse
from folovllm.worker_proc.step_arrays import StepLimits
from tests.fakes import tiny_models
from tests.fakes.attention import PagedRequest, build_metadata, model_config
from tests.fakes.runner_driver import CPU_FLOAT32, Driver, load_model
from tests.fakes.triton_device import triton_device

FP8 = dataclasses.replace(CPU_FLOAT32, fp8_cache=True)
LIMITS = StepLimits(
    num_slots=4,
    max_model_len=160,
    max_num_batched_tokens=256,
    num_blocks=160,
    block_size=4,
    vocab_size=tiny_models.VOCAB_SIZE,
    num_valid_token_ids=tiny_models.VOCAB_SIZE,
)
PROMPTS = ([3, 5, 7, 11, 13], list(range(40, 61)), list(range(100, 137)))


@dataclasses.dataclass(frozen=True)
class Loaded:
    model: CausalLM
    config: ModelConfig
    scales: torch.Tensor


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tiny_models.make_model(tmp_path_factory.mktemp("model"), request.param)
    model, config = load_model(folder, LIMITS.max_model_len), read_model_config(folder)
    return Loaded(model, config, scales_of(model, config))


@torch.inference_mode()
def scales_of(model: CausalLM, config: ModelConfig) -> torch.Tensor:
    return calibrate(model, config, CPU_FLOAT32, 128, config.vocab_size)


def ids_of(loaded: Loaded) -> torch.Tensor:
    return torch.randint(loaded.config.vocab_size, (120,), generator=torch.Generator().manual_seed(5))


@torch.inference_mode()
def logits_of(loaded: Loaded, placement: Placement, chunks: list[int]) -> tuple[torch.Tensor, KVTensors]:
    """Logits of 120 tokens, computed in chunks, and the cache afterwards."""
    kv = KVTensors(loaded.config, 40, 4, placement, loaded.scales if placement.fp8_cache else None)
    ids, request, logits = ids_of(loaded), PagedRequest(list(range(1, 31))), []
    for chunk in chunks:
        step = TorchNaiveBackend().begin_step(kv, build_metadata([request], [chunk], 4))
        positions = torch.arange(request.num_computed, request.num_computed + chunk)
        logits.append(loaded.model.compute_logits(loaded.model.forward(ids[positions], positions, step)))
        request.num_computed += chunk
    return torch.cat(logits), kv


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_a_number_is_rounded_by_a_sixteenth_of_itself_at_most() -> None:
    values = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([0.001, 0.01, 0.1, 1.0])[:, None] * values.abs().amax(1, keepdim=True) / 4
    found = dequantize(quantize(values, scales), scales)
    error = (found - values).abs()
    assert (error <= values.abs() / 16 + scales * 2**-10).logical_or(values.abs() > LARGEST * scales).all()
    assert torch.equal(found.abs().amax(1) <= LARGEST * scales[:, 0], torch.ones(4, dtype=torch.bool))


def test_what_is_too_large_is_clamped() -> None:
    stored = quantize(torch.tensor([[900.0, -900.0, 1e30, -torch.inf]]), torch.tensor([[2.0]]))
    assert stored.dtype == torch.float8_e4m3fn
    assert dequantize(stored, torch.tensor([[2.0]])).tolist() == [[896.0, -896.0, 896.0, -896.0]]


# ---- scales ----------------------------------------------------------------------------------------------------------


def test_each_head_has_a_scale_for_twice_its_largest_number() -> None:
    largest = LargestHeads(model_config(2, 8), torch.device("cpu"))
    heads = torch.zeros(3, 4, 8)  # K heads 0 and 1, V heads 0 and 1
    heads[1, 0, 3], heads[2, 1, 0], heads[0, 2, 7] = -7.0, 0.5, torch.inf
    largest.attend(1, torch.zeros(3, 4, 8), heads)
    expected = torch.tensor([[14 / LARGEST, 1 / LARGEST], [1.0, 1.0]])
    assert torch.equal(largest.scales(), torch.stack([torch.ones(2, 2), expected])), "1 where nothing is known"


def test_the_pass_computes_what_the_model_computes(loaded: Loaded) -> None:
    """What is measured is what a cache of the same tokens would hold."""
    largest = LargestHeads(loaded.config, torch.device("cpu"))
    with torch.inference_mode():
        loaded.model.forward(ids_of(loaded), torch.arange(120), largest)
    _, kv = logits_of(loaded, CPU_FLOAT32, [120])
    torch.testing.assert_close(
        largest.largest.unflatten(1, (2, -1)), kv.data.abs().amax((3, 4, 5)), atol=1e-4, rtol=1e-4
    )


def test_scales_are_the_same_each_time_and_clamp_nothing_of_another_text(loaded: Loaded) -> None:
    assert torch.equal(scales_of(loaded.model, loaded.config), loaded.scales)
    _, kv = logits_of(loaded, CPU_FLOAT32, [120])
    used = kv.data.abs().amax((3, 4, 5)) / (LARGEST * loaded.scales)
    assert used.max() < 1 and used.min() > 0.1, "most of the range is in use"


# ---- logits and tokens -----------------------------------------------------------------------------------------------


def test_logits_stay_within_a_tenth(loaded: Loaded) -> None:
    """Measured for these models of random weights: 6.5 to 8.2 % of the logits' norm, 91 to 94 % of greedy tokens."""
    exact, _ = logits_of(loaded, CPU_FLOAT32, [120])
    found, kv = logits_of(loaded, FP8, [120])
    assert kv.data.dtype == torch.float8_e4m3fn
    assert 0.01 < (found - exact).norm() / exact.norm() < 0.1
    assert (found.argmax(-1) == exact.argmax(-1)).float().mean() > 0.85


def test_chunks_see_what_a_whole_prompt_sees(loaded: Loaded) -> None:
    """A step attends to what it has stored, not to what it stores it from: only sums are rounded differently."""
    whole, stored = logits_of(loaded, FP8, [120])
    chunked, others = logits_of(loaded, FP8, [1, 50, 1, 1, 67])
    assert (whole - chunked).norm() / whole.norm() < 0.02
    assert (stored.data.float() != others.data.float()).float().mean() < 0.01


@pytest.fixture
def driver(loaded: Loaded) -> Driver:
    kv = KVTensors(loaded.config, LIMITS.num_blocks, LIMITS.block_size, FP8, loaded.scales)
    states = RequestStates(LIMITS, FP8.device)
    runner = ModelRunner(loaded.model, TorchNaiveBackend(), kv, states)
    rehearse(runner, states, kv, Rehearsal(2, 16, 2))
    assert not kv.data.float().any(), "the warm-up leaves nothing"
    return Driver(runner, LIMITS)


def test_requests_together_answer_as_alone(driver: Driver) -> None:
    alone = []
    for prompt in PROMPTS:
        driver.join(0, prompt)
        alone.append(driver.finish(0, 10))
    driver.leave(0)
    requests = [driver.join(slot, prompt) for slot, prompt in enumerate(PROMPTS)]
    while len(requests[-1].output) < 10:
        driver.step({slot: request.num_known - request.num_computed for slot, request in driver.requests.items()})
    assert [request.output for request in requests] == alone


def test_tritons_kernels_answer_as_the_reference(loaded: Loaded) -> None:
    """Prompts in chunks, beside decodes; on the GPU, or in Triton's interpreter."""
    device = triton_device()
    if device.type != "cpu":
        pytest.skip("the model of these tests is on the CPU; tests/gpu has the same for a GPU")
    from folovllm.worker_proc.attention.triton_paged import HeadCounts, TritonPagedBackend

    config = loaded.config
    heads = HeadCounts(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    found = []
    for backend in (TorchNaiveBackend(), TritonPagedBackend(heads, FP8)):
        kv = KVTensors(config, LIMITS.num_blocks, LIMITS.block_size, FP8, loaded.scales)
        driver = Driver(ModelRunner(loaded.model, backend, kv, RequestStates(LIMITS, FP8.device)), LIMITS)
        first, second = driver.join(0, PROMPTS[0]), driver.join(1, PROMPTS[1])
        for counts in ({0: 5, 1: 9}, {0: 1, 1: 12}, {0: 1, 1: 1}, {0: 1, 1: 1}):
            driver.step(counts)
        found.append((first.output, second.output, kv.data.float()))
    assert found[0][:2] == found[1][:2] and len(found[0][0]) == 4
    assert (found[0][2] != found[1][2]).float().mean() < 1e-3, "stored alike, but for sums that round to another number"

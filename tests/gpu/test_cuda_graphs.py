"""Captured steps on the GPU: the same tokens as operator by operator, whatever joins, leaves or is computed again."""

import pathlib
import random

import numpy as np
import pytest
import torch

from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kernels.cpu.background import CpuKernels
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.model_runner import ModelRunner
from folovllm.worker_proc.models.registry import CausalLM, build_model
from folovllm.worker_proc.request_states import RequestStates
from folovllm.worker_proc.startup import choose_graphs
from folovllm.worker_proc.step_arrays import StepLimits
from folovllm.worker_proc.weights import load_weights
from tests.fakes.runner_driver import Driver
from tests.fakes.tiny_models import make_model

pytestmark = pytest.mark.gpu

LIMITS = StepLimits(
    num_slots=12,
    max_model_len=600,
    max_num_batched_tokens=700,
    num_blocks=480,
    block_size=16,
    vocab_size=512,
    num_valid_token_ids=500,
)
SAMPLING = (SamplingRow(), SamplingRow(temperature=0.8, seed=5), SamplingRow(temperature=1.0, top_k=20, seed=-3))


@pytest.fixture(
    scope="module",
    params=[(torch.float32, False, False), (torch.bfloat16, True, False), (torch.bfloat16, True, True)],
    ids=["float32", "bfloat16", "fp8 cache"],
)
def placed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CausalLM, pathlib.Path, Placement]:
    """A tiny model as Triton runs it; in bf16 with dependent launches."""
    dtype, dependent, fp8 = request.param
    folder = make_model(tmp_path_factory.mktemp("model"), "qwen3", vocab_size=LIMITS.vocab_size)
    placement = Placement(torch.device("cuda"), dtype, use_triton=True, dependent_launch=dependent, fp8_cache=fp8)
    model = build_model(read_model_config(folder), placement, LIMITS.max_model_len)
    load_weights(model, folder)
    return model, folder, placement


def make_runner(
    placed: tuple[CausalLM, pathlib.Path, Placement], *, captured: bool
) -> tuple[ModelRunner, RequestStates]:
    from folovllm.worker_proc.attention.triton_paged import HeadCounts, TritonPagedBackend

    model, folder, placement = placed
    config = read_model_config(folder)
    kv = KVTensors(config, LIMITS.num_blocks, LIMITS.block_size, placement)
    states = RequestStates(LIMITS, placement.device)
    heads = HeadCounts(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    backend = TritonPagedBackend(heads, placement)
    kernels = CpuKernels(config, kv.block_size, placement)
    graphs = choose_graphs(model, backend, kv, states, kernels) if captured else None
    return ModelRunner(model, backend, kv, states, graphs), states


def play(runner: ModelRunner, states: RequestStates, num_steps: int) -> dict[int, list[int]]:
    """Random joining, leaving, chunks and decodes; the tokens of every request that left or was still there."""
    generator = random.Random(1)
    driver = Driver(runner, LIMITS)
    answers: dict[int, list[int]] = {}
    serial: dict[int, int] = {}
    for number in range(num_steps):
        for slot in range(LIMITS.num_slots):
            here = driver.requests.get(slot)
            if here is not None and (here.num_known > LIMITS.max_model_len - 8 or generator.random() < 0.02):
                answers[serial.pop(slot)] = here.output
                driver.leave(slot)
            if slot not in driver.requests and generator.random() < 0.1:
                prompt = [generator.randrange(LIMITS.vocab_size) for _ in range(generator.choice([1, 5, 40, 200]))]
                driver.join(slot, prompt, SAMPLING[generator.randrange(3)])
                serial[slot] = number * LIMITS.num_slots + slot
        counts = {}
        for slot, request in driver.requests.items():
            left = request.num_known - request.num_computed
            if generator.random() < 0.9:
                counts[slot] = left if left == 1 else generator.choice([left, max(1, left // 2)])
        if counts and sum(counts.values()) <= LIMITS.max_num_batched_tokens:
            driver.step(counts)
    check_rows(driver, states)
    return answers | {serial[slot]: request.output for slot, request in driver.requests.items()}


def check_rows(driver: Driver, states: RequestStates) -> None:
    """The rows on the device are those that a rebuilt state would have."""
    for slot, request in driver.requests.items():
        if request.is_new:
            continue
        assert int(states.num_computed[slot]) == request.num_computed == states.counts.num_computed[slot]
        assert states.token_ids[slot, : len(request.tokens)].tolist() == request.tokens
        assert states.block_table[slot, : len(request.blocks)].tolist() == request.blocks


def test_two_thousand_steps_are_those_of_the_operators(placed: tuple[CausalLM, pathlib.Path, Placement]) -> None:
    """In float32 token for token; in bf16, where padding may change how cuBLAS rounds, the rows alone are compared."""
    captured = play(*make_runner(placed, captured=True), 2000)
    assert sum(len(answer) for answer in captured.values()) > 3000
    if placed[2].dtype == torch.float32:
        assert captured == play(*make_runner(placed, captured=False), 2000)


def test_depth_and_padding_change_nothing(placed: tuple[CausalLM, pathlib.Path, Placement]) -> None:
    answers = []
    for ahead in (1, 2):
        runner, _ = make_runner(placed, captured=True)
        driver = Driver(runner, LIMITS)
        for slot in range(3):
            driver.join(slot, [7 + slot, 9, 11], SAMPLING[slot % 2])
        driver.submit(dict.fromkeys(range(3), 3))
        for _ in range(20):
            if ahead == 1:
                driver.collect()
            driver.submit(dict.fromkeys(range(3), 1))
            if ahead == 2:
                driver.collect()
        driver.collect()
        answers.append([request.output for request in driver.requests.values()])
    assert answers[0] == answers[1]
    assert all(np.unique(answer).size > 1 for answer in answers[0])

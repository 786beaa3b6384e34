"""A GPU with too little memory for a step: it is computed in parts, with the same tokens."""

import pathlib
from collections.abc import Iterator

import pytest
import torch

from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.attention.paged import PagedBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.model_runner import ModelRunner
from folovllm.worker_proc.models.registry import build_model
from folovllm.worker_proc.request_states import RequestStates
from folovllm.worker_proc.step_arrays import StepLimits
from folovllm.worker_proc.weights import load_weights
from tests.fakes.runner_driver import Driver
from tests.fakes.tiny_models import make_model

pytestmark = pytest.mark.gpu

MIB = 2**20
NUM_REQUESTS = 256
LIMITS = StepLimits(
    num_slots=NUM_REQUESTS,
    max_model_len=64,
    max_num_batched_tokens=1024,
    num_blocks=2 * NUM_REQUESTS,
    block_size=16,
    vocab_size=151936,  # logits of all requests take 148 MiB in float32
    num_valid_token_ids=151669,
)
LEFT = 80 * MIB  # beside what is in use, for one step


@pytest.fixture
def all_memory_again() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("all_memory_again")
def test_in_parts_as_whole(tmp_path: pathlib.Path) -> None:
    folder = make_model(tmp_path / "model", "qwen3", vocab_size=LIMITS.vocab_size)
    config = read_model_config(folder)
    placement = Placement(torch.device("cuda"), torch.float32)
    model = build_model(config, placement, LIMITS.max_model_len)
    load_weights(model, folder)
    kv = KVTensors(config, LIMITS.num_blocks, LIMITS.block_size, placement)
    answers = []
    for is_short in (False, True):
        states = RequestStates(LIMITS, placement.device)
        driver = Driver(ModelRunner(model, PagedBackend(config.num_attention_heads), kv, states), LIMITS)
        if is_short:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + LEFT) / total)
        for slot in range(NUM_REQUESTS):
            driver.join(slot, [slot, 7 * slot % 100, 3])
        outputs = [driver.step(dict.fromkeys(range(NUM_REQUESTS), 3))]
        outputs += [driver.step(dict.fromkeys(range(NUM_REQUESTS), 1)) for _ in range(4)]
        assert (outputs[0].max_num_tokens > 0) is is_short
        answers.append([request.output for request in driver.requests.values()])
    same = [one == other for one, other in zip(*answers, strict=True)]
    assert sum(same) >= NUM_REQUESTS - 3, "products of fewer rows are rounded otherwise: a tie may fall the other way"

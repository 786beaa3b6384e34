"""Logits of the reference model's shape in bf16 on the card, against transformers in float32."""

import pathlib

import pytest
import torch
import transformers

from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.attention.choice import choose_backend
from folovllm.worker_proc.device import place
from folovllm.worker_proc.kernels.cpu.background import CpuKernels
from tests.fakes.network_runner import NetworkRunner
from tests.fakes.reference_shape import save_reference_shape

pytestmark = pytest.mark.gpu

BLOCK_SIZE = 16
MAX_MODEL_LEN = 2048
MOST = 0.02  # of the logits' norm


@torch.inference_mode()
@pytest.mark.parametrize(
    "step_sizes", [[2000], [512, 512, 300, 1], [1]], ids=["whole prompts", "chunks, then decodes", "decodes alone"]
)
def test_within_two_percent_of_float32(tmp_path: pathlib.Path, step_sizes: list[int]) -> None:
    folder = tmp_path / "model"
    save_reference_shape(folder)
    config, placement = read_model_config(folder), place(torch.device("cuda"), torch.bfloat16)
    backend = choose_backend("auto", config, placement, BLOCK_SIZE, CpuKernels(config, BLOCK_SIZE, placement))
    assert backend.name == "triton_paged"
    runner = NetworkRunner(folder, backend, placement, MAX_MODEL_LEN, BLOCK_SIZE)
    longest = 40 if step_sizes == [1] else 1400
    prompts = [torch.randint(0, config.vocab_size, (length,)) for length in (longest, 17, 1)]
    logits = runner.logits(prompts, step_sizes)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
    for prompt, found in zip(prompts, logits, strict=True):
        expected = reference(prompt[None].cuda()).logits[0]
        error = (found.float() - expected).norm() / expected.norm()
        assert found.shape == expected.shape and error < MOST

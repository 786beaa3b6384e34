"""Constraints and log probabilities on the GPU: as on the CPU, and without ever waiting for the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from folovllm.worker_proc.sample.constraints import apply_constraints
from folovllm.worker_proc.sample.logprobs import ALL, LogprobRows, PromptPart, SampledLogprobs, prompt_logprobs
from folovllm.worker_proc.sample.sampler import sample
from tests.fakes.sampling_mix import LIMITS, NUM_IDS, Mix

pytestmark = pytest.mark.gpu


@contextmanager
def no_waiting() -> Iterator[None]:
    """An operation that waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(6))
def test_random_mixes_equal_the_reference_without_waiting(seed: int) -> None:
    mix = Mix(seed, torch.device("cuda"), with_processors=False)
    batch = mix.start()
    for step in range(6):
        logits = torch.randn(LIMITS.num_slots, NUM_IDS, generator=torch.Generator().manual_seed(step)) * 4
        expected = [mix.reference(slot, logits[slot].double().tolist()) for slot in range(LIMITS.num_slots)]
        changed = logits.cuda()
        with no_waiting():
            apply_constraints(changed, batch.constraints)
            sample(changed, batch.sampling)
        torch.testing.assert_close(changed.cpu().double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-4)
        mix.sampled(batch)
        with no_waiting():
            batch = mix.step()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    """In bf16 many values tie: the lowest ids come first here too."""
    logits = (torch.randn(12, 3000, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    tokens = torch.arange(12) * 7
    wanted = [(row, (0, 1, 5, 40, ALL)[row % 5]) for row in range(12)]
    found = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        asked = LogprobRows.make(wanted, 2990, device)
        on_device = logits.to(device), tokens.to(device)
        with no_waiting():
            made = SampledLogprobs(asked, *on_device, 2990)
        found.append(made.read(torch.cat(made.words).cpu().numpy(), np.zeros(12, np.bool_))[1])
    cpu, cuda = found
    assert cpu is not None
    assert cuda is not None
    assert (cpu.counts, cpu.token_ids, cpu.ranks) == (cuda.counts, cuda.token_ids, cuda.ranks)
    np.testing.assert_allclose(np.frombuffer(cuda.values, "<f4"), np.frombuffer(cpu.values, "<f4"), atol=1e-5)


@torch.inference_mode()
def test_prompts_leave_the_device_part_by_part_without_waiting() -> None:
    """2,048 places of 152k columns, of which the float32 logits would take 1.2 GB."""
    num_columns = 151_936
    head = torch.randn(num_columns, 64, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(2048, 64, device="cuda", dtype=torch.bfloat16)
    token_ids = torch.randint(0, num_columns, (1, 2049), dtype=torch.int32, device="cuda")
    part = PromptPart(row=0, slot=0, start=1, count=2048, first=0, k=2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with no_waiting():
        (pending,) = prompt_logprobs([part], hidden, lambda rows: rows @ head.T, token_ids, num_columns)
    message = pending.wait()
    assert torch.cuda.max_memory_allocated() - before < 300e6
    assert len(message.logprobs.counts) == 4 * 2048
    found = np.frombuffer(message.logprobs.values, "<f4").reshape(2048, 3)[:, 0]
    rows = [0, 1000, 2047]
    expected = (hidden[rows] @ head.T).float().log_softmax(-1).gather(1, token_ids[0, 1:][rows].long()[:, None])
    np.testing.assert_allclose(found[rows], expected[:, 0].cpu().numpy(), atol=1e-2)

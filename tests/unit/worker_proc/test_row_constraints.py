"""What rows ask for, put together: random mixes against a reference of Python lists; nothing uploaded twice."""

import pytest
import torch

from folovllm.common.messages.core_worker import SamplingRow, SchedulerOutput
from folovllm.worker_proc.input_batch import InputBatchBuilder
from folovllm.worker_proc.request_states import RequestStates
from folovllm.worker_proc.sample.constraints import apply_constraints
from tests.fakes.fake_core import int32, new_request
from tests.fakes.sampling_mix import LIMITS, NUM_IDS, Mix

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(12))
def test_random_mixes_equal_the_reference(seed: int) -> None:
    mix = Mix(seed, CPU)
    batch = mix.start()
    for step in range(6):
        logits = torch.randn(LIMITS.num_slots, NUM_IDS, generator=torch.Generator().manual_seed(step)) * 4
        expected = [mix.reference(slot, logits[slot].double().tolist()) for slot in range(LIMITS.num_slots)]
        apply_constraints(logits, batch.constraints)
        torch.testing.assert_close(logits.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)
        mix.sampled(batch)
        batch = mix.step()


def test_unchanged_decodes_upload_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their requests ask for: what a step needs is on the device."""
    mix = Mix(3, CPU)
    mix.sampled(mix.start())
    for _ in range(6):  # until nobody is below min_tokens
        mix.sampled(mix.step())

    def fail(array: object, device: object) -> None:
        raise AssertionError("an upload")

    for module in ("input_batch", "row_constraints", "request_states", "sample.constraints", "sample.bad_words"):
        monkeypatch.setattr(f"folovllm.worker_proc.{module}.upload", fail)
    batch = mix.step()
    assert len(batch.constraints) == 5
    apply_constraints(torch.zeros(LIMITS.num_slots, NUM_IDS), batch.constraints)


def test_plain_rows_make_no_constraints() -> None:
    states = RequestStates(LIMITS, CPU)
    builder = InputBatchBuilder(states, {})
    plain = SamplingRow(temperature=1.0, top_p=0.5, prompt_logprobs=0)
    step = SchedulerOutput(0, int32([2]), int32([3]), [new_request(2, [1, 2, 3], [1], plain)])
    batch = builder.build(states.apply(step))
    assert batch.constraints == []
    assert batch.index.constraints.logprobs is None
    assert states.is_plain[2]


def test_a_slot_that_is_filled_again_keeps_nothing() -> None:
    """The one before had everything; the step's bytes are those of a decode step."""
    states = RequestStates(LIMITS, CPU)
    builder = InputBatchBuilder(states, {})
    full = SamplingRow(presence_penalty=1.0, logprobs=2, prompt_logprobs=1, allowed_token_ids=int32([4]))
    first = builder.build(states.apply(SchedulerOutput(0, int32([2]), b"", [new_request(2, [1], [1], full)])))
    assert (len(first.constraints), first.index.constraints.logprobs is None) == (2, False)
    second = builder.build(states.apply(SchedulerOutput(1, int32([2]), b"", [new_request(2, [1], [1])])))
    assert (second.constraints, second.index.constraints.logprobs) == ([], None)
    assert (states.is_plain[2], states.reports_prompt[2], states.extras[2]) == (True, False, None)

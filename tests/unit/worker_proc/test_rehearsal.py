"""Made-up steps are steps that the worker would take from a core, whatever the limits are."""

import pytest

from folovllm.worker_proc.rehearsal import Rehearsal, rehearsal_steps
from folovllm.worker_proc.sampling_extras import read_extras
from folovllm.worker_proc.step_arrays import SlotCounts, StepLimits, read_step


def limits(num_slots: int, max_model_len: int, max_num_batched_tokens: int, block_size: int = 4) -> StepLimits:
    return StepLimits(num_slots, max_model_len, max_num_batched_tokens, 2, block_size, 10, 10)


@pytest.mark.parametrize(
    "cut",
    [
        limits(8, 64, 256),
        limits(1, 64, 8),
        limits(8, 2, 8),
        limits(8, 17, 8, block_size=1024),
        limits(3, 5, 1000, block_size=1),
    ],
)
def test_every_step_fits_the_limits(cut: StepLimits) -> None:
    counts = SlotCounts.empty(cut.num_slots)
    sampled = 0
    for step in rehearsal_steps(cut, Rehearsal(num_requests=4, prompt_len=16, num_decodes=3)):
        arrays = read_step(step, counts, cut)
        counts = arrays.counts
        counts.num_computed[arrays.slots] += arrays.query_lens
        done = arrays.slots[counts.num_computed[arrays.slots] == counts.num_tokens[arrays.slots]]
        counts.num_tokens[done] += 1
        sampled += len(done)
    assert sampled >= 1


def test_what_fits_is_rehearsed_in_full() -> None:
    steps = list(rehearsal_steps(limits(8, 64, 256), Rehearsal(num_requests=4, prompt_len=16, num_decodes=3)))
    assert len(steps) == 4
    assert len(steps[0].new_requests) == 4
    assert {len(new.token_ids) for new in steps[0].new_requests} == {16 * 4}
    kinds = {(new.sampling.temperature > 0, new.sampling.top_k > 0) for new in steps[0].new_requests}
    assert kinds == {(False, False), (True, False), (True, True)}, "every way of sampling"
    extras = [made for new in steps[0].new_requests if (made := read_extras(new.sampling, 10, "rehearsed")) is not None]
    assert any(made.has_penalty and made.bad_words and len(made.bias_ids) for made in extras)
    assert any(made.logprobs is not None and made.prompt_logprobs is not None for made in extras)
    assert len(extras) < 4, "and the plain way"

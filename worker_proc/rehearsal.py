"""Steps such as the core sends, made up to warm the worker up and to measure the memory of its largest steps."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from folovllm.common.messages.core_worker import NewRequest, SamplingRow, SchedulerOutput
from folovllm.worker_proc.step_arrays import StepLimits

# Every way of sampling is passed through, one request after another taking the next. What requests seldom ask for is
# asked for by one: its operators have run then, and largest steps are measured with everything in them.
_ONE = np.zeros(1, "<i4").tobytes()
_SAMPLING = (
    SamplingRow(
        temperature=1.0,
        top_p=0.9,
        top_k=50,
        presence_penalty=0.1,
        bias_token_ids=_ONE,
        bias_values=np.zeros(1, "<f4").tobytes(),
        bad_words=[_ONE * 2],
        logprobs=1,
        prompt_logprobs=0,
    ),
    SamplingRow(temperature=1.0),
    SamplingRow(),
)
_BLOCK = 1  # all requests write to this one block: what they compute means nothing, what it costs is the same


class Rehearsal(NamedTuple):
    """How much is to be rehearsed; cut down to what the limits allow.

    Attributes:
        num_requests: requests at once.
        prompt_len: tokens of each, computed in the first step.
        num_decodes: steps after the first, of one token each.
    """

    num_requests: int
    prompt_len: int
    num_decodes: int


def rehearsal_steps(limits: StepLimits, rehearsal: Rehearsal) -> Iterator[SchedulerOutput]:
    """The steps: one that computes the prompts, then those of one token for each request."""
    num_requests = min(rehearsal.num_requests, limits.num_slots, limits.max_num_batched_tokens)
    prompt_len = min(rehearsal.prompt_len, limits.max_model_len - 1, limits.max_num_batched_tokens // num_requests)
    num_decodes = min(rehearsal.num_decodes, limits.max_model_len - 1 - prompt_len)
    num_blocks = -(-(prompt_len + num_decodes) // limits.block_size)
    prompt = np.zeros(prompt_len, "<i4").tobytes()
    blocks = np.full(num_blocks, _BLOCK, "<i4").tobytes()
    new = [
        NewRequest(slot, prompt, prompt_len, 0, blocks, _SAMPLING[slot % len(_SAMPLING)])
        for slot in range(num_requests)
    ]
    slots = np.arange(num_requests, dtype="<i4").tobytes()
    lens = np.full(num_requests if prompt_len > 1 else 0, prompt_len, "<i4").tobytes()
    yield SchedulerOutput(0, slots, lens, new)
    for step_id in range(1, num_decodes + 1):
        yield SchedulerOutput(step_id, slots)

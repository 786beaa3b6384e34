"""The steps that the bare worker executes, and whose tokens are whose."""

import numpy as np

from bench.peers.bare import collect, steps_for
from folovllm.common.config import EngineConfig
from folovllm.common.messages.core_worker import SchedulerOutput
from tests.fakes.fake_worker import FastModel

CONFIG = EngineConfig(model="none", max_num_batched_tokens=256, max_num_seqs=8)


def prompts_of(*lengths: int) -> list[list[int]]:
    return [[100 * number + i for i in range(length)] for number, length in enumerate(lengths)]


def numbered_tokens(steps: list[SchedulerOutput]) -> list[bytes]:
    """A token for each that a step samples: 1000 times the step's number plus the slot's place among those."""
    model = FastModel()
    counts = [len(model.execute(step).token_ids) // 4 for step in steps]
    return [np.arange(1000 * i, 1000 * i + count, dtype="<i4").tobytes() for i, count in enumerate(counts)]


def test_the_steps_are_the_schedulers() -> None:
    """Chunks of 256 tokens: two prompts and a half, then the rest with the first decodes."""
    steps = list(steps_for(prompts_of(100, 100, 100), 3, CONFIG, num_blocks=100))
    counts = [np.frombuffer(step.num_scheduled_tokens, "<i4").tolist() for step in steps]
    assert counts == [[100, 100, 56], [44], [], []]
    assert [len(step.slots) // 4 for step in steps] == [3, 3, 3, 1]


def test_requests_have_prompts_as_they_were_given() -> None:
    prompts = prompts_of(5, 3)
    steps = list(steps_for(prompts, 2, CONFIG, num_blocks=100))
    assert [np.frombuffer(new.token_ids, "<i4").tolist() for step in steps for new in step.new_requests] == prompts


def test_every_request_gets_its_tokens() -> None:
    steps = list(steps_for(prompts_of(100, 100, 100), 3, CONFIG, num_blocks=100))
    answers = collect(steps, numbered_tokens(steps))
    assert [len(answer) for answer in answers] == [3, 3, 3]
    assert answers[0][0] == 0
    assert answers[1][0] == 1
    assert answers[2][0] // 1000 == 1  # its prompt ended in the second step


def test_a_slot_that_is_taken_again_belongs_to_the_next_request() -> None:
    config = EngineConfig(model="none", max_num_batched_tokens=256, max_num_seqs=1)
    steps = list(steps_for(prompts_of(4, 4), 2, config, num_blocks=100))
    assert {len(step.slots) // 4 for step in steps} == {1}
    answers = collect(steps, numbered_tokens(steps))
    assert [[token // 1000 for token in answer] for answer in answers] == [[0, 1], [2, 3]]

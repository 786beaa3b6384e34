"""What rows ask for, put together: random mixes against a reference of Python lists; nothing uploaded twice."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from folovllm.common.messages.core_worker import SamplingRow, SchedulerOutput
from folovllm.worker_proc.input_batch import InputBatch, InputBatchBuilder
from folovllm.worker_proc.request_states import RequestStates
from folovllm.worker_proc.sample.constraints import apply_constraints
from folovllm.worker_proc.step_arrays import StepLimits
from tests.fakes.fake_core import int32, new_request

CPU = torch.device("cpu")
NUM_IDS = 20
LIMITS = StepLimits(
    num_slots=8,
    max_model_len=60,
    max_num_batched_tokens=512,
    num_blocks=99,
    block_size=60,
    vocab_size=NUM_IDS + 3,
    num_valid_token_ids=NUM_IDS,
)


def halve_even(logits: torch.Tensor, token_ids: torch.Tensor, num_prompt_tokens: int, argument: Any) -> torch.Tensor:
    """A processor whose result depends on all that it is given."""
    wanted = torch.arange(len(logits)) % argument == int(token_ids.sum() + num_prompt_tokens) % argument
    return torch.where(wanted, logits / 2, logits)


class Mix:
    """Requests with random parameters in all slots, and what the reference makes of a step's logits."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.states = RequestStates(LIMITS, CPU)
        self.builder = InputBatchBuilder(self.states, {"halve": halve_even})
        self.rows: list[SamplingRow] = []
        self.tokens: list[list[int]] = []
        self.num_prompt: list[int] = []
        self._step_id = 0

    def ids(self, low: int, high: int) -> list[int]:
        return [self.chance.randrange(NUM_IDS) for _ in range(self.chance.randrange(low, high))]

    def row(self) -> SamplingRow:
        chance, fields = self.chance, dict[str, Any]()
        if chance.random() < 0.5:
            fields |= {"presence_penalty": chance.uniform(-2, 2), "repetition_penalty": chance.choice([0.5, 1.0, 1.7])}
        if chance.random() < 0.5:
            fields["frequency_penalty"] = chance.uniform(-2, 2)
        if chance.random() < 0.5:
            ids = sorted(set(self.ids(1, 6)))
            values = np.array([chance.uniform(-9, 9) for _ in ids], "<f4")
            fields |= {"bias_token_ids": int32(ids), "bias_values": values.tobytes()}
        if chance.random() < 0.5:
            fields["allowed_token_ids"] = int32(self.ids(1, 30))
        if chance.random() < 0.5:
            fields["bad_words"] = [int32(self.ids(1, 3)) for _ in range(5)]
        if chance.random() < 0.5:
            fields |= {"min_tokens": chance.randrange(6), "stop_token_ids": int32([*self.ids(1, 5), 22])}
        if chance.random() < 0.5:
            fields["logits_processors"] = [("halve", str(chance.randrange(2, 5)))] * chance.randrange(1, 3)
        return SamplingRow(**fields)

    def start(self) -> InputBatch:
        """Some come back after preemption: part of their answer is there."""
        new = []
        for slot in range(LIMITS.num_slots):
            prompt = [*self.ids(1, 10), 21]
            answer = self.ids(0, 8)
            self.rows.append(self.row())
            self.tokens.append([*prompt, *answer])
            self.num_prompt.append(len(prompt))
            new.append(
                new_request(slot, self.tokens[-1], [slot + 1], self.rows[-1], num_prompt_tokens=self.num_prompt[-1])
            )
        return self.step(new_requests=new, num_scheduled_tokens=int32(map(len, self.tokens)))

    def step(self, **fields: Any) -> InputBatch:
        step = SchedulerOutput(self._step_id, int32(range(LIMITS.num_slots)), **fields)
        self._step_id += 1
        arrays = self.states.apply(step)
        batch = self.builder.build(arrays)
        index = batch.index
        self.states.advance(arrays, index.slots, index.query_lens, index.host_sampling_slots)
        return batch

    def sampled(self, batch: InputBatch) -> None:
        """Everybody gets a token, known on the device alone until now."""
        drawn = [self.chance.randrange(NUM_IDS) for _ in self.rows]
        self.states.record(batch.index.sampling_slots, batch.next_positions, torch.tensor(drawn))
        for tokens, token in zip(self.tokens, drawn, strict=True):
            tokens.append(token)

    def reference(self, slot: int, logits: list[float]) -> list[float]:
        row, known, num_prompt = self.rows[slot], self.tokens[slot], self.num_prompt[slot]
        answer, none = known[num_prompt:], -float("inf")
        for token, value in zip(_ids(row.bias_token_ids), np.frombuffer(row.bias_values, "<f4").tolist(), strict=True):
            logits[token] += value
        for token in {*known} - {21}:
            repetition = row.repetition_penalty
            logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        for token in answer:
            logits[token] -= row.frequency_penalty
        for token in set(answer):
            logits[token] -= row.presence_penalty
        for _, argument in row.logits_processors:
            chosen = (sum(known) + num_prompt) % int(argument)
            logits = [x / 2 if token % int(argument) == chosen else x for token, x in enumerate(logits)]
        if row.allowed_token_ids:
            logits = [x if token in _ids(row.allowed_token_ids) else none for token, x in enumerate(logits)]
        for word in map(_ids, row.bad_words):
            if len(answer) >= len(word) - 1 and answer[len(answer) - len(word) + 1 :] == word[:-1]:
                logits[word[-1]] = none
        if len(answer) < row.min_tokens:
            logits = [none if token in _ids(row.stop_token_ids) else x for token, x in enumerate(logits)]
        return logits


def _ids(field: bytes) -> list[int]:
    values: list[int] = np.frombuffer(field, "<i4").tolist()
    return values


@pytest.mark.parametrize("seed", range(12))
def test_random_mixes_equal_the_reference(seed: int) -> None:
    mix = Mix(seed)
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
    mix = Mix(3)
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

"""Requests with random parameters, and what is to become of their logits, computed with Python lists."""

import random
from typing import Any

import numpy as np
import torch

from folovllm.common.messages.core_worker import SamplingRow, SchedulerOutput
from folovllm.worker_proc.input_batch import InputBatch, InputBatchBuilder
from folovllm.worker_proc.request_states import RequestStates
from folovllm.worker_proc.step_arrays import StepLimits
from tests.fakes.fake_core import int32, new_request

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

    def __init__(self, seed: int, device: torch.device, *, with_processors: bool = True) -> None:
        self.chance = random.Random(seed)
        self.with_processors = with_processors
        self.states = RequestStates(LIMITS, device)
        self.builder = InputBatchBuilder(self.states, {"halve": halve_even})
        self.rows: list[SamplingRow] = []
        self.tokens: list[list[int]] = []
        self.num_prompt: list[int] = []
        self._step_id = 0

    def ids(self, low: int, high: int) -> list[int]:
        return [self.chance.randrange(NUM_IDS) for _ in range(self.chance.randrange(low, high))]

    def row(self) -> SamplingRow:
        """About half of the parameters."""
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
        if self.with_processors and chance.random() < 0.5:
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
        self.states.record(batch.index.sampling_slots, batch.next_positions, torch.tensor(drawn).to(self.states.device))
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

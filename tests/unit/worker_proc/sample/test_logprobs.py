"""Log probabilities against sorted Python lists; parts, groups and neighbours make no difference."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from folovllm.common.messages.core_worker import Logprobs
from folovllm.worker_proc.sample import logprobs as module
from folovllm.worker_proc.sample.logprobs import (
    ALL,
    LogprobRows,
    PromptPart,
    SampledLogprobs,
    measure,
    number_of,
    prompt_logprobs,
)
from tests.fakes.simulated_logprobs import Place, unpack

CPU = torch.device("cpu")
NUM_COLUMNS = 40
NUM_VALID = 37


def reference(logits: torch.Tensor, chosen: int, k: int, num_valid: int = NUM_VALID) -> Place:
    values = logits.float().log_softmax(-1).tolist()
    order = sorted(range(num_valid), key=lambda token: (-values[token], token))
    entries = [(token, values[token]) for token in [chosen, *order[: number_of(k, num_valid)]]]
    return Place(entries, sum(values[token] >= values[chosen] for token in range(num_valid)))


def random_logits(num_rows: int, seed: int = 0, *, ties: bool = False) -> torch.Tensor:
    logits = torch.randn(num_rows, NUM_COLUMNS, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if ties else logits


def sampled(wanted: list[tuple[int, int]], logits: torch.Tensor, tokens: list[int], void: list[int]) -> Any:
    made = SampledLogprobs(LogprobRows.make(wanted, NUM_VALID, CPU), logits, torch.tensor(tokens), NUM_VALID)
    is_void: npt.NDArray[np.bool_] = np.isin(np.arange(len(tokens)), void)
    return made.read(torch.cat(made.words).numpy(), is_void)


def test_values_are_those_of_float64_and_sum_to_one() -> None:
    logits = random_logits(3)
    words = measure(logits, torch.tensor([1, 2, 3]), NUM_COLUMNS, NUM_COLUMNS).numpy()
    values = words[:, NUM_COLUMNS + 1 : -1].view(np.float32)
    expected = torch.gather(logits.double().log_softmax(-1), 1, torch.from_numpy(words[:, : NUM_COLUMNS + 1]).long())
    assert np.abs(values - expected.numpy()).max() < 1e-6
    assert np.allclose(np.exp(values[:, 1:].astype(np.float64)).sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [0, 1, 5, NUM_VALID, ALL, 10**6])
def test_places_equal_the_reference(k: int, ties: bool) -> None:
    """Equal values stand in the order of their ids, and count for the rank."""
    logits, tokens = random_logits(6, ties=ties), [0, 5, 36, 7, 7, 12]
    rows, made = sampled([(row, k) for row in range(6)], logits, tokens, [])
    assert rows.tolist() == list(range(6))
    assert unpack(made) == [reference(logits[row], tokens[row], k) for row in range(6)]


def test_ids_that_cannot_be_sampled_count_in_the_sum_but_are_not_listed() -> None:
    logits = torch.zeros(1, NUM_COLUMNS)
    logits[0, NUM_VALID:] = 50.0
    _, made = sampled([(0, 3)], logits, [2], [])
    ((entries, rank),) = unpack(made)
    assert [token for token, _ in entries] == [2, 0, 1, 2]
    assert entries[0][1] == pytest.approx(-50 - math.log(3), abs=1e-5)
    assert rank == NUM_VALID


def test_L15_zero_reports_the_sampled_token_alone() -> None:
    logits = random_logits(1)
    _, made = sampled([(0, 0)], logits, [9], [])
    ((entries, rank),) = unpack(made)
    assert entries == reference(logits[0], 9, 0).entries
    assert len(entries) == 1
    assert rank == reference(logits[0], 9, 0).rank


def test_rows_of_different_k_are_reported_in_their_order() -> None:
    wanted = [(1, 3), (2, ALL), (3, 0), (5, 2), (6, 30), (7, 1)]
    logits, tokens = random_logits(8, seed=1), [0, 3, 6, 9, 12, 15, 18, 21]
    rows, made = sampled(wanted, logits, tokens, [])
    assert rows.tolist() == [row for row, _ in wanted]
    assert unpack(made) == [reference(logits[row], tokens[row], k) for row, k in wanted]


def test_void_rows_are_not_reported() -> None:
    logits = random_logits(4, seed=2)
    logits[1] = math.nan
    rows, made = sampled([(0, 2), (1, 2), (3, 5)], logits, [4, 0, 5, 6], [1, 2])
    assert rows.tolist() == [0, 3]
    assert unpack(made) == [reference(logits[0], 4, 2), reference(logits[3], 6, 5)]
    rows, made = sampled([(1, 2)], logits, [4, 0, 5, 6], [1])
    assert (rows.tolist(), made) == ([], None)


def test_parts_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, logits, tokens = [(row, row % 4) for row in range(20)], random_logits(20, seed=3), list(range(20))
    whole = sampled(wanted, logits, tokens, [2])
    monkeypatch.setattr(module, "_MAX_ELEMENTS_CPU", 3 * NUM_COLUMNS)
    in_parts = sampled(wanted, logits, tokens, [2])
    assert (whole[0].tolist(), whole[1]) == (in_parts[0].tolist(), in_parts[1])


def test_a_whole_sort_gives_what_the_cut_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, tokens = random_logits(5, seed=4, ties=True), torch.tensor([1, 2, 3, 4, 5])
    cut = measure(logits, tokens, NUM_VALID, 9)
    monkeypatch.setattr(module, "_SORT_FROM", 1)
    assert torch.equal(measure(logits, tokens, NUM_VALID, 9), cut)


def test_both_zeros_are_one_value() -> None:
    """A token of probability 1 has the logarithm 0, of either sign; impossible ones stand in the order of their ids."""
    logits = torch.full((1, 5), -math.inf)
    logits[0, 3] = 7.0
    words = measure(logits, torch.tensor([3]), 5, 5).tolist()[0]
    assert words[:6] == [3, 3, 0, 1, 2, 4]
    assert words[-1] == 1


def test_bfloat16_logits_are_widened_first() -> None:
    logits = random_logits(2, seed=5).bfloat16()
    _, made = sampled([(0, 4), (1, 4)], logits, [8, 9], [])
    assert unpack(made) == [reference(logits[0], 8, 4), reference(logits[1], 9, 4)]


class Head:
    """Hidden states are rows of logits already; remembers how many were asked for at once."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(hidden))
        return hidden


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_prompt_parts_are_predicted_by_the_tokens_before(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(module, "_MAX_ELEMENTS", at_once * NUM_VALID)
    hidden = random_logits(12, seed=6)
    token_ids = torch.arange(3 * 20, dtype=torch.int32).view(3, 20) % NUM_VALID
    parts = [PromptPart(row=0, slot=2, start=5, count=4, first=0, k=2), PromptPart(1, 0, 1, 7, 5, ALL)]
    head = Head()
    messages = [each.wait() for each in prompt_logprobs(parts, hidden, head, token_ids, NUM_VALID)]
    assert [(message.row, message.start) for message in messages] == [(0, 5), (1, 1)]
    for part, message in zip(parts, messages, strict=True):
        chosen = token_ids[part.slot, part.start : part.start + part.count].tolist()
        places = [reference(hidden[part.first + i], token, part.k) for i, token in enumerate(chosen)]
        assert unpack(message.logprobs) == places
    assert max(head.sizes) <= at_once
    assert sum(head.sizes) == 11


def test_nobody_asks_nothing_happens() -> None:
    assert prompt_logprobs([], torch.zeros(0), Head(), torch.zeros(0), NUM_VALID) == []


def test_the_message_is_of_little_endian_words() -> None:
    _, made = sampled([(0, 1)], random_logits(1), [3], [])
    assert isinstance(made, Logprobs)
    assert (len(made.counts), len(made.token_ids), len(made.values), len(made.ranks)) == (4, 8, 8, 4)

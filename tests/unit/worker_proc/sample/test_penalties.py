"""Penalties against a reference that counts in Python and computes in float64, and against transformers."""

import collections
import random
from typing import NamedTuple

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from folovllm.worker_proc.sample import penalties
from folovllm.worker_proc.sample.constraints import RowTokens
from folovllm.worker_proc.sample.penalties import CountScratch, PenalisedRows, Penalties
from tests.fakes.row_tokens import row_tokens

CPU = torch.device("cpu")
NUM_COLUMNS = 50


class Penalty(NamedTuple):
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0


def penalised(penalties_of: dict[int, Penalty]) -> PenalisedRows:
    """Row → its penalties."""
    figures = torch.tensor(list(penalties_of.values()), dtype=torch.float32).T[:, :, None]
    return PenalisedRows(torch.tensor(list(penalties_of)), figures[0], figures[1], figures[2], list(penalties_of))


def apply(logits: torch.Tensor, penalties_of: dict[int, Penalty], tokens: RowTokens) -> torch.Tensor:
    changed = logits.clone()
    Penalties(penalised(penalties_of), tokens, CountScratch(logits.shape[1], CPU)).apply(changed)
    return changed


def reference(logits: torch.Tensor, penalty: Penalty, prompt: list[int], answer: list[int]) -> torch.Tensor:
    row = logits.double().tolist()
    for token in {*prompt, *answer}:
        if token < len(row):
            row[token] = row[token] / penalty.repetition if row[token] > 0 else row[token] * penalty.repetition
    for token, count in collections.Counter(answer).items():
        row[token] -= penalty.frequency * count + penalty.presence
    return torch.tensor(row, dtype=torch.float64)


def test_L11_repetition_sees_the_prompt_the_other_two_the_answer_alone() -> None:
    """A prompt with a token twice; the answer is empty, then holds another token twice."""
    logits = torch.full((1, 10), 2.0)
    for answer, presence, frequency in (([], 0.0, 0.0), ([7, 7], 1.5, 3.0)):
        tokens = row_tokens([[5, 9, 9]], [answer])
        repeated = apply(logits, {0: Penalty(repetition=2.0)}, tokens)
        assert repeated.tolist()[0] == [1.0 if token in {5, 9, *answer} else 2.0 for token in range(10)]
        present = apply(logits, {0: Penalty(presence=1.5)}, tokens)
        assert present.tolist()[0] == [2.0 - presence if token == 7 else 2.0 for token in range(10)]
        frequent = apply(logits, {0: Penalty(frequency=1.5)}, tokens)
        assert frequent.tolist()[0] == [2.0 - frequency if token == 7 else 2.0 for token in range(10)]


@pytest.mark.parametrize("most_elements", [2**23, 2 * NUM_COLUMNS])
def test_random_rows_equal_the_reference(monkeypatch: pytest.MonkeyPatch, most_elements: int) -> None:
    """Rows with and without penalties, in any order; also when only two rows fit into the scratch at once."""
    monkeypatch.setattr(penalties, "_MAX_SCRATCH_ELEMENTS", most_elements)
    chance = random.Random(1)
    scratch = CountScratch(NUM_COLUMNS, CPU)
    for trial in range(30):
        prompts = [[chance.randrange(NUM_COLUMNS + 5) for _ in range(chance.randrange(1, 30))] for _ in range(7)]
        answers = [[chance.randrange(NUM_COLUMNS) for _ in range(chance.randrange(40))] for _ in range(7)]
        logits = torch.randn(7, NUM_COLUMNS, generator=torch.Generator().manual_seed(trial)) * 5
        rows = chance.sample(range(7), chance.randrange(1, 7))
        chosen = {
            row: Penalty(chance.uniform(-2, 2), chance.uniform(-2, 2), chance.choice([0.5, 1.0, 1.3])) for row in rows
        }
        changed = logits.clone()
        Penalties(penalised(chosen), row_tokens(prompts, answers), scratch).apply(changed)
        for row in range(7):
            expected = reference(logits[row], chosen.get(row, Penalty()), prompts[row], answers[row])
            torch.testing.assert_close(changed[row].double(), expected, rtol=1e-5, atol=1e-5)
            if row not in chosen:
                assert torch.equal(changed[row], logits[row])


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.8])
def test_repetition_equals_transformers(penalty: float) -> None:
    chance = random.Random(2)
    tokens = [chance.randrange(NUM_COLUMNS) for _ in range(25)]
    logits = torch.randn(1, NUM_COLUMNS, generator=torch.Generator().manual_seed(3))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits.clone())
    changed = apply(logits, {0: Penalty(repetition=penalty)}, row_tokens([tokens[:9]], [tokens[9:]]))
    assert torch.equal(changed, expected)


def test_L11_neighbours_and_their_order_change_nothing() -> None:
    prompts, answers = [[1, 2, 2], [3], [4, 4]], [[5, 5, 6], [7], [8, 8, 8, 8]]
    logits = torch.randn(3, NUM_COLUMNS, generator=torch.Generator().manual_seed(4))
    chosen = [Penalty(0.5, 0.25, 1.5), Penalty(), Penalty(-1.0, 1.0, 0.5)]
    together = apply(logits, dict(enumerate(chosen)), row_tokens(prompts, answers))
    for row in range(3):
        alone = apply(logits[row : row + 1], {0: chosen[row]}, row_tokens([prompts[row]], [answers[row]]))
        assert torch.equal(alone[0], together[row])
    turned = apply(logits.flip(0), dict(enumerate(reversed(chosen))), row_tokens(prompts[::-1], answers[::-1]))
    assert torch.equal(turned.flip(0), together)


def test_logits_that_are_a_view_are_changed_in_place() -> None:
    columns = torch.full((2, 8), 4.0)
    view = columns[:, :6]
    Penalties(
        penalised({1: Penalty(repetition=2.0)}), row_tokens([[0], [3, 7]], [[], [5]]), CountScratch(6, CPU)
    ).apply(view)
    assert columns.tolist() == [[4.0] * 8, [4.0, 4.0, 4.0, 2.0, 4.0, 2.0, 4.0, 4.0]]


def test_the_scratch_is_left_empty_and_grows_only_when_it_must() -> None:
    scratch = CountScratch(6, CPU)
    tokens, ones = torch.tensor([[1, 1, 3], [0, 0, 0]]), torch.ones(2, 3, dtype=torch.int64)
    for _ in range(2):
        assert scratch.count(tokens, ones).tolist() == [[2, 2, 1], [3, 3, 3]]
    assert scratch.count(tokens[:1], ones[:1]).tolist() == [[2, 2, 1]]


def test_a_forbidden_token_stays_forbidden() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 2.0]])
    changed = apply(logits, {0: Penalty(-2.0, -2.0, 0.5)}, row_tokens([[0]], [[0, 0]]))
    assert changed.tolist() == [[-torch.inf, 1.0, 2.0]]

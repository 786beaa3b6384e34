"""Forbidden sequences against a reference in Python, and against transformers."""

import random

import numpy as np
import torch
from transformers import NoBadWordsLogitsProcessor

from folovllm.worker_proc.sample.bad_words import BadWordRows, BadWords
from tests.fakes.row_tokens import row_tokens

CPU = torch.device("cpu")
NUM_COLUMNS = 12


def forbidden(words: list[tuple[int, list[int]]], prompts: list[list[int]], answers: list[list[int]]) -> list[set[int]]:
    """Which tokens are forbidden in each row."""
    logits = torch.randn(len(prompts), NUM_COLUMNS, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    made = BadWordRows.make([(row, np.array(word, np.int64)) for row, word in words], CPU)
    BadWords(made, row_tokens(prompts, answers)).apply(logits)
    banned = logits == -torch.inf
    assert torch.equal(logits[~banned], before[~banned])
    return [set(row.nonzero().flatten().tolist()) for row in banned]


def reference(words: list[list[int]], answer: list[int]) -> set[int]:
    return {word[-1] for word in words if word[:-1] == answer[len(answer) - len(word) + 1 :]}


def test_L13_a_single_token_is_never_allowed_a_sequence_only_where_it_would_end() -> None:
    """A word in two spellings: one token, or three tokens of which the first alone stays allowed."""
    words = [(0, [6]), (0, [3, 1, 5])]
    assert forbidden(words, [[2]], [[]]) == [{6}]
    assert forbidden(words, [[2]], [[3]]) == [{6}]
    assert forbidden(words, [[2]], [[3, 1]]) == [{5, 6}]
    assert forbidden(words, [[2]], [[3, 1, 1]]) == [{6}]
    assert forbidden(words, [[2]], [[7, 3, 1]]) == [{5, 6}]


def test_the_prompt_does_not_count() -> None:
    words = [(0, [3, 1, 5]), (0, [1, 4])]
    assert forbidden(words, [[3, 1]], [[]]) == [set()]
    assert forbidden(words, [[3]], [[1]]) == [{4}]
    assert forbidden(words, [[9]], [[3, 1]]) == [{4, 5}]


def test_only_single_tokens_need_no_look_at_the_answer() -> None:
    assert forbidden([(1, [4]), (1, [0]), (0, [4])], [[1], [1], [1]], [[], [], []]) == [{4}, {0, 4}, set()]


def test_sequences_that_end_alike_do_not_undo_each_other() -> None:
    words = [(0, [1, 5]), (0, [2, 5]), (0, [3, 2, 5]), (0, [5, 5])]
    assert forbidden(words, [[0]], [[2]]) == [{5}]
    assert forbidden(words[::-1], [[0]], [[1]]) == [{5}]
    assert forbidden(words, [[0]], [[4]]) == [set()]


def test_random_words_equal_the_reference() -> None:
    chance = random.Random(5)
    for _ in range(60):
        prompts = [[chance.randrange(3) for _ in range(chance.randrange(1, 6))] for _ in range(4)]
        answers = [[chance.randrange(3) for _ in range(chance.randrange(8))] for _ in range(4)]
        words = [
            (chance.randrange(4), [chance.randrange(3) for _ in range(chance.randrange(1, 5))])
            for _ in range(chance.randrange(1, 12))
        ]
        expected = [reference([word for each, word in words if each == row], answers[row]) for row in range(4)]
        assert forbidden(words, prompts, answers) == expected


def test_equals_transformers_within_the_answer() -> None:
    chance = random.Random(6)
    words = [[chance.randrange(3) for _ in range(length)] for length in (1, 2, 2, 3, 4)]
    for _ in range(30):
        answer = [chance.randrange(3) for _ in range(6)]
        scores = torch.zeros(1, NUM_COLUMNS)
        changed = NoBadWordsLogitsProcessor(words)(torch.tensor([answer]), scores)
        expected = set((changed[0] == -torch.inf).nonzero().flatten().tolist())
        assert forbidden([(0, word) for word in words], [[11]], [answer]) == [expected]

"""A grammar's masks: a bit for each token, applied before what may only take away."""

import math

import numpy as np
import pytest
import torch

from folovllm.worker_proc.sample.constraints import MinTokens, apply_constraints
from folovllm.worker_proc.sample.token_mask import TokenMask

CPU = torch.device("cpu")


def masks_of(num_tokens: int, *allowed: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint32]]:
    masks = np.zeros((len(allowed), -(-num_tokens // 32)), np.uint32)
    for row, tokens in enumerate(allowed):
        for token in tokens:
            masks[row, token // 32] |= np.uint32(1 << token % 32)
    return masks


def left(logits: torch.Tensor) -> list[list[int]]:
    return [torch.nonzero(row > -math.inf).flatten().tolist() for row in logits]


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 64, 97, 1000])
def test_what_is_not_in_the_mask_is_forbidden(num_tokens: int) -> None:
    allowed = [[0, num_tokens - 1], list(range(0, num_tokens, 3)), []]
    logits = torch.arange(4.0 * num_tokens).view(4, num_tokens)
    before = logits.clone()
    TokenMask(np.array([2, 0, 3]), masks_of(num_tokens, *allowed), CPU).apply(logits)
    assert left(logits) == [allowed[1], list(range(num_tokens)), sorted(set(allowed[0])), []]
    kept = logits > -math.inf
    assert torch.equal(logits[kept], before[kept])


def test_the_highest_bit_of_a_word_counts() -> None:
    logits = torch.zeros(1, 64)
    TokenMask(np.array([0]), np.array([[1 << 31, (1 << 31) | 1]], np.uint32), CPU).apply(logits)
    assert left(logits) == [[31, 32, 63]]


def test_min_tokens_takes_the_end_away_from_a_mask_and_may_leave_nothing() -> None:
    logits = torch.zeros(2, 40)
    mask = TokenMask(np.array([0, 1]), masks_of(40, [5, 39], [39]), CPU)
    apply_constraints(logits, [MinTokens([(0, [39]), (1, [39])], 40, CPU), mask])
    assert left(logits) == [[5], []]

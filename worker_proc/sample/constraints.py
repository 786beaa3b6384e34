"""The one place where tokens are forbidden, in one order of precedence.

Constraints change logits in this order, which is that of `Precedence`: logit bias first, since it only adds; then what
forbids: allowed ids, grammar, bad words, min_tokens. Forbidding is final (-inf stays -inf whatever is added), so
a later constraint can only take away. A row that is left without any token is found by the sampler and ends its request
with a reason.

A new kind of constraint is a class with `precedence` and `apply`, and one member here.
"""

import enum
import math
from collections.abc import Sequence
from typing import Protocol

import torch


class Precedence(enum.IntEnum):
    """The order in which constraints are applied."""

    LOGIT_BIAS = 0
    ALLOWED_TOKEN_IDS = 1
    GRAMMAR = 2
    BAD_WORDS = 3
    MIN_TOKENS = 4


class Constraint(Protocol):
    """Something that changes the logits of some rows of a step."""

    precedence: Precedence

    def apply(self, logits: torch.Tensor) -> None:
        """Changes `logits` [R, V] in place; a forbidden token gets -inf."""
        ...


class MinTokens:
    """Forbids the stop set in rows whose answer is still shorter than `min_tokens`."""

    precedence = Precedence.MIN_TOKENS

    def __init__(self, stop_ids: Sequence[tuple[int, Sequence[int]]], num_columns: int, device: torch.device) -> None:
        """`stop_ids`: (row, its stop set). Ids from `num_columns` on have no logit and are passed over."""
        pairs = [(row, token) for row, tokens in stop_ids for token in tokens if 0 <= token < num_columns]
        self._rows = torch.tensor([row for row, _ in pairs], dtype=torch.int64, device=device)
        self._tokens = torch.tensor([token for _, token in pairs], dtype=torch.int64, device=device)

    def apply(self, logits: torch.Tensor) -> None:
        logits[self._rows, self._tokens] = -math.inf


def apply_constraints(logits: torch.Tensor, constraints: Sequence[Constraint]) -> None:
    """Applies all constraints of a step to `logits` [R, V], in place and in order of precedence."""
    for constraint in sorted(constraints, key=lambda each: each.precedence):
        constraint.apply(logits)

"""The one place where logits are changed, in one order of precedence.

Constraints change logits in this order, which is that of `Precedence`:

1. Logit bias, which adds.
2. Penalties: repetition multiplies or divides what is there, then frequency and presence are taken off. Bias comes
   before them as in vLLM and transformers; the order matters where a bias turns a logit's sign.
3. Logits processors, which are the user's code and see what the two before have made.
4. What forbids: allowed ids, grammar, bad words, min_tokens. Forbidding is final (-inf stays -inf), and comes last, so
   nothing that a processor returns brings a forbidden token back.

Temperature and the filters (`sampler`) come after all of them; log probabilities (`logprobs`) are taken before. A row
that is left without any token is found by the sampler and ends its request with a reason.

A new kind of constraint is a class with `precedence` and `apply`, and one member here.
"""

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from folovllm.worker_proc.host_to_device import upload
from folovllm.worker_proc.wire_fields import Ids

TokenIds = Sequence[int] | Ids


class Precedence(enum.IntEnum):
    """The order in which constraints are applied."""

    LOGIT_BIAS = 0
    PENALTIES = 1
    LOGITS_PROCESSORS = 2
    ALLOWED_TOKEN_IDS = 3
    GRAMMAR = 4
    BAD_WORDS = 5
    MIN_TOKENS = 6


class Constraint(Protocol):
    """Something that changes the logits of some rows of a step."""

    precedence: Precedence

    def apply(self, logits: torch.Tensor) -> None:
        """Changes `logits` [R, V] in place; a forbidden token gets -inf."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class RowTokens:
    """What a step's R rows have so far; tensors are on the device.

    Attributes:
        token_ids: [num_slots, max_model_len]; prompt and answer of each slot.
        slots: [R] which of these are the rows'.
        num_prompt, num_known: [R] tokens of the prompt; of prompt and answer, what earlier steps sampled included.
        host_slots, host_num_prompt, host_num_known: the same on the host.
    """

    token_ids: torch.Tensor
    slots: torch.Tensor
    num_prompt: torch.Tensor
    num_known: torch.Tensor
    host_slots: Ids
    host_num_prompt: Ids
    host_num_known: Ids


class LogitBias:
    """Adds to the logits of single tokens."""

    precedence = Precedence.LOGIT_BIAS

    def __init__(self, biases: Sequence[tuple[int, TokenIds, npt.NDArray[np.float32]]], device: torch.device) -> None:
        """`biases`: (row, tokens, what is added to each); no token twice in a row."""
        self._rows, self._tokens = _places([(row, tokens) for row, tokens, _ in biases], device)
        self._values = upload(np.concatenate([values for _, _, values in biases]), device)

    def apply(self, logits: torch.Tensor) -> None:
        logits[self._rows, self._tokens] = logits[self._rows, self._tokens] + self._values


class AllowedTokenIds:
    """Forbids all tokens of a row but some."""

    precedence = Precedence.ALLOWED_TOKEN_IDS

    def __init__(self, allowed: Sequence[tuple[int, TokenIds]], device: torch.device) -> None:
        """`allowed`: (row, tokens)."""
        self._rows, self._tokens = _places(allowed, device)
        self._whole_rows = upload(np.array([row for row, _ in allowed], np.int64), device)

    def apply(self, logits: torch.Tensor) -> None:
        kept = logits[self._rows, self._tokens]
        logits.index_fill_(0, self._whole_rows, -math.inf)
        logits[self._rows, self._tokens] = kept


class MinTokens:
    """Forbids the stop set in rows whose answer is still shorter than `min_tokens`."""

    precedence = Precedence.MIN_TOKENS

    def __init__(self, stop_ids: Sequence[tuple[int, TokenIds]], num_columns: int, device: torch.device) -> None:
        """`stop_ids`: (row, its stop set). Ids from `num_columns` on have no logit and are passed over."""
        known = [(row, [token for token in tokens if 0 <= token < num_columns]) for row, tokens in stop_ids]
        self._rows, self._tokens = _places(known, device)

    def apply(self, logits: torch.Tensor) -> None:
        forbid(logits, self._rows, self._tokens)


def forbid(logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> None:
    """Sets logits to -inf at (row, token). Assigning the number itself would copy it from the host, and wait."""
    logits.index_put_((rows, tokens), logits.new_full((), -math.inf))


def apply_constraints(logits: torch.Tensor, constraints: Sequence[Constraint]) -> None:
    """Applies all constraints of a step to `logits` [R, V], in place and in order of precedence."""
    for constraint in sorted(constraints, key=lambda each: each.precedence):
        constraint.apply(logits)


def _places(tokens_of: Sequence[tuple[int, TokenIds]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and tokens of (row, its tokens), side by side, in one upload."""
    rows = np.repeat([row for row, _ in tokens_of], [len(tokens) for _, tokens in tokens_of])
    tokens = np.concatenate([np.asarray(tokens, np.int64) for _, tokens in tokens_of])
    both = upload(np.stack([rows, tokens]).astype(np.int64), device)
    return both[0], both[1]

"""Presence, frequency and repetition penalties, counted anew in each step from the tokens that the rows hold.

With two steps in flight the last token is known to the device alone, so counting happens there. No count is kept from
step to step: counts follow from a row's tokens, which are right after preemption and for steps scheduled ahead, and so
are these. A matrix of counts for all slots and tokens, changed by one entry a step, would take 155 MB for 256 slots of
152k tokens, and would have to be applied as a whole.

Instead only the places of a row's own tokens are touched, N of them: ones are added up at these places of a scratch
matrix of zeros, read back (each place now knows how often its token occurs), and zeroed again; the logits at these
places are read, penalised and written back. Where a token occurs several times, every occurrence writes the same value.

Cost: some twenty passes over [P, N], for P rows with a penalty and N tokens of the longest; the vocabulary does not
matter. On one CPU core 16 rows of 200 tokens take 0.2 ms, of 1,000 tokens 1.0 ms; applying a matrix of counts as a
whole took 6 ms for 49k columns and 20 ms for 152k. Only beyond some 10,000 tokens a row would the matrix be cheaper.

As in vLLM: the repetition penalty, for tokens of prompt and answer, divides a positive logit and multiplies a negative
one; then frequency times count and, for tokens that occur, presence are taken off, for tokens of the answer.
"""

import dataclasses
from typing import Final

import torch

from folovllm.worker_proc.sample.constraints import Precedence, RowTokens

_ANSWER: Final = 2**32  # added to a count for an occurrence in the answer; 1 for any occurrence
_MAX_SCRATCH_ELEMENTS: Final = 2**23  # 64 MB; more rows are penalised part by part


class CountScratch:
    """A matrix of zeros [rows, num_columns], as large as any step has needed so far."""

    def __init__(self, num_columns: int, device: torch.device) -> None:
        self.most_rows = max(1, _MAX_SCRATCH_ELEMENTS // num_columns)
        self._zeros = torch.zeros(0, num_columns, dtype=torch.int64, device=device)

    def count(self, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """For each of `tokens` [P, N], P ≤ `most_rows`: the sum of the `weights` of its occurrences in its row."""
        num_rows, (have, num_columns) = tokens.shape[0], self._zeros.shape
        if have < num_rows:
            self._zeros = self._zeros.new_zeros(num_rows, num_columns)
        counts = self._zeros[:num_rows].scatter_add_(1, tokens, weights)
        try:
            return counts.gather(1, tokens)
        finally:  # also without memory for the result: what is left here would be counted for other requests
            counts.scatter_(1, tokens, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class PenalisedRows:
    """Rows with a penalty, made once for a batch.

    Attributes:
        rows: [P] int64; which of the step's rows.
        presence, frequency, repetition: [P, 1] float32.
        host_rows: `rows` on the host.
    """

    rows: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    repetition: torch.Tensor
    host_rows: list[int]

    def part(self, begin: int, end: int) -> "PenalisedRows":
        """Some of the rows."""
        return PenalisedRows(
            self.rows[begin:end],
            self.presence[begin:end],
            self.frequency[begin:end],
            self.repetition[begin:end],
            self.host_rows[begin:end],
        )


class Penalties:
    """The penalties of a step."""

    precedence = Precedence.PENALTIES

    def __init__(self, penalised: PenalisedRows, tokens: RowTokens, scratch: CountScratch) -> None:
        self._penalised = penalised
        self._tokens = tokens
        self._scratch = scratch

    def apply(self, logits: torch.Tensor) -> None:
        size = self._scratch.most_rows
        for begin in range(0, len(self._penalised.host_rows), size):
            self._apply_part(logits, self._penalised.part(begin, begin + size))

    def _apply_part(self, logits: torch.Tensor, part: PenalisedRows) -> None:
        tokens, weights = self._weighted_tokens(part, logits.shape[1])
        counts = self._scratch.count(tokens, weights)
        in_answer = counts.div(_ANSWER, rounding_mode="floor").to(torch.float32)
        rows = part.rows[:, None]
        old = logits[rows, tokens]
        repeated = torch.where(old > 0, old / part.repetition, old * part.repetition)
        new = torch.where(counts > 0, repeated, old) - part.frequency * in_answer
        logits[rows, tokens] = new - part.presence * (in_answer > 0)

    def _weighted_tokens(self, part: PenalisedRows, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [P, N] and what each occurrence adds to its token's count.

        What lies past a row's end, or has no logit (such ids can stand in a prompt), is token 0 that adds nothing.
        """
        all_tokens, longest = self._tokens, int(self._tokens.host_num_known[part.host_rows].max())
        slots = all_tokens.slots.index_select(0, part.rows)
        tokens = all_tokens.token_ids[:, :longest].index_select(0, slots).to(torch.int64)
        places = torch.arange(longest, device=tokens.device)
        counts = (places < all_tokens.num_known.index_select(0, part.rows)[:, None]) & (tokens < num_columns)
        in_answer = places >= all_tokens.num_prompt.index_select(0, part.rows)[:, None]
        return tokens.where(counts, 0), counts * (1 + in_answer * _ANSWER)

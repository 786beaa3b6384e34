"""What a batch's rows ask for beyond drawing from the distribution, made into constraints and requests for reports.

What depends only on which requests sample is made and uploaded once for a batch; each step of the same requests puts it
together with what their rows on the device hold by then, and uploads nothing.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from folovllm.worker_proc.host_to_device import upload
from folovllm.worker_proc.request_states import MIN_TOKENS, NUM_PROMPT, RequestStates
from folovllm.worker_proc.sample.bad_words import BadWordRows, BadWords
from folovllm.worker_proc.sample.constraints import AllowedTokenIds, Constraint, LogitBias, MinTokens, RowTokens
from folovllm.worker_proc.sample.logprobs import LogprobRows
from folovllm.worker_proc.sample.penalties import CountScratch, PenalisedRows, Penalties
from folovllm.worker_proc.sample.processors import LogitsProcessor, Processors
from folovllm.worker_proc.sampling_extras import SamplingExtras
from folovllm.worker_proc.wire_fields import Ids

_Extras = list[tuple[int, SamplingExtras]]


class SharedParts:
    """What the constraints of all batches share: loaded processors, and the penalties' scratch memory."""

    def __init__(self, states: RequestStates, processors: Mapping[str, LogitsProcessor]) -> None:
        self.processors = processors
        self.scratch = CountScratch(states.limits.num_valid_token_ids, states.device)


class RowConstraints:
    """Those of one batch's rows that sample.

    Attributes:
        logprobs: the rows that are reported; None if nobody asks.
    """

    def __init__(self, states: RequestStates, slots: Ids, shared: SharedParts) -> None:
        """`slots`: of the rows that sample."""
        self._states = states
        self._slots = slots
        self._shared = shared
        self._num_prompt = states.host_integers[slots, NUM_PROMPT]
        self._min_tokens: tuple[bytes, list[Constraint]] = (b"", [])
        extras = _extras_of(states, slots)
        device = states.device
        self._fixed = _fixed(extras, device)
        self._penalised = _penalised(extras, device)
        words = [(row, word) for row, each in extras for word in each.bad_words]
        self._bad_words = BadWordRows.make(words, device) if words else None
        self._calls: list[tuple[int, list[tuple[str, Any]]]] = [
            (row, each.processors) for row, each in extras if each.processors
        ]
        reported = [(row, each.logprobs) for row, each in extras if each.logprobs is not None]
        num_columns = states.limits.num_valid_token_ids
        self.logprobs = LogprobRows.make(reported, num_columns, device) if reported else None
        self._looks_at_tokens = any(
            part is not None for part in (self._penalised, self._bad_words, self._calls or None)
        )

    def of_step(
        self, slots: torch.Tensor, num_prompt: torch.Tensor, num_known: torch.Tensor, host_num_known: Ids
    ) -> list[Constraint]:
        """This step's constraints.

        Args:
            slots, num_prompt, num_known: [S] on the device: the rows' slots, the tokens of their prompts, and of prompt
                and answer.
            host_num_known: the last on the host.
        """
        constraints = self._fixed + self._of_min_tokens(host_num_known)
        if not self._looks_at_tokens:
            return constraints
        tokens = RowTokens(
            self._states.token_ids, slots, num_prompt, num_known, self._slots, self._num_prompt, host_num_known
        )
        if self._penalised is not None:
            constraints.append(Penalties(self._penalised, tokens, self._shared.scratch))
        if self._bad_words is not None:
            constraints.append(BadWords(self._bad_words, tokens))
        if self._calls:
            constraints.append(Processors(self._calls, tokens, self._shared.processors))
        return constraints

    def _of_min_tokens(self, num_known: Ids) -> list[Constraint]:
        """Forbids the stop set where the answer is shorter than min_tokens; made anew only for other rows."""
        states, slots = self._states, self._slots
        too_short = num_known - self._num_prompt < states.host_integers[slots, MIN_TOKENS]
        if not too_short.any():
            return []
        key = too_short.tobytes()
        if self._min_tokens[0] != key:
            stops = [(row, states.stop_token_ids[slots[row]]) for row in np.flatnonzero(too_short).tolist()]
            self._min_tokens = (key, [MinTokens(stops, states.limits.num_valid_token_ids, states.device)])
        return self._min_tokens[1]


def _extras_of(states: RequestStates, slots: Ids) -> _Extras:
    rows = np.flatnonzero(~states.is_plain[slots]).tolist()
    return [(row, extras) for row in rows if (extras := states.extras[slots[row]]) is not None]


def _fixed(extras: _Extras, device: torch.device) -> list[Constraint]:
    """Constraints that look at no tokens."""
    biases = [(row, each.bias_ids, each.bias_values) for row, each in extras if len(each.bias_ids)]
    allowed = [(row, each.allowed_ids) for row, each in extras if each.allowed_ids is not None]
    constraints: list[Constraint] = []
    if biases:
        constraints.append(LogitBias(biases, device))
    if allowed:
        constraints.append(AllowedTokenIds(allowed, device))
    return constraints


def _penalised(extras: _Extras, device: torch.device) -> PenalisedRows | None:
    penalised = [(row, each) for row, each in extras if each.has_penalty]
    if not penalised:
        return None
    rows = [row for row, _ in penalised]
    figures = [(each.presence_penalty, each.frequency_penalty, each.repetition_penalty) for _, each in penalised]
    presence, frequency, repetition = upload(np.array(figures, np.float32).T.copy(), device)[:, :, None]
    return PenalisedRows(upload(np.array(rows, np.int64), device), presence, frequency, repetition, rows)

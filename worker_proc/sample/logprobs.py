"""Log probabilities: of the network's own distribution, before any bias, penalty, mask and temperature.

log_softmax in float32 over all of the logits' columns. Reported are, for each place, the chosen token, the k most
likely of the ids that can be sampled (falling; ties by lowest id) and the chosen one's rank: how many ids are at least
as likely. The order is that of the reported float32 values, so it is the same whatever a place shares its step with.

The largest k with ties in order come from one `topk` of integers: a float32's bits, made to rise with its value, above
the id's complement.

What is computed leaves the device as int32 words, a place in a row: [chosen, k ids, k + 1 values, rank]. Sampled
tokens' words go in the same copy as the tokens themselves. Rows are computed part by part, so that a chunk of 2,048
prompt tokens never has its 2,048 × 152k logits in memory at once. Nothing here is computed or uploaded in a step for
which nobody asked.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from folovllm.common.messages.core_worker import Logprobs, PromptLogprobs
from folovllm.worker_proc.host_to_device import Download, upload
from folovllm.worker_proc.wire_fields import Ids

ALL: Final = -1  # in place of a number of tokens
_MAX_ELEMENTS: Final = 2**22  # logits computed at once: 16 MB as float32, 32 MB as keys
_MAX_ELEMENTS_CPU: Final = 2**16  # measured at once on a CPU, in its caches: 0.4 ms for 49,152 columns, 1.0 otherwise
_SORT_FROM: Final = 1024  # so many of the largest are cut off a whole sort
_LOW_WORD: Final = 2**32 - 1

Words = npt.NDArray[np.int32]


def measure(logits: torch.Tensor, chosen: torch.Tensor, num_columns: int, k: int) -> torch.Tensor:
    """Words of N places, int32 [N, 2k + 3].

    Args:
        logits: [N, columns], the network's, of any float type; not changed.
        chosen: [N] int64, below `columns`.
        num_columns: ids that can be sampled are below this; only these are among the most likely and have a rank.
        k: how many of the most likely tokens, 0 to `num_columns`.
    """
    at_once = _MAX_ELEMENTS_CPU if logits.device.type == "cpu" else _MAX_ELEMENTS
    parts = [
        _measured(logits[rows], chosen[rows], num_columns, k)
        for rows in _parts(logits.shape[0], logits.shape[1], at_once)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _measured(logits: torch.Tensor, chosen: torch.Tensor, num_columns: int, k: int) -> torch.Tensor:
    logprobs = logits.to(torch.float32).log_softmax(dim=-1)
    of_chosen = logprobs.gather(1, chosen[:, None])
    valid = logprobs[:, :num_columns]
    rank = (valid >= of_chosen).sum(dim=-1, keepdim=True)
    ids = _most_likely(valid, k)
    values = torch.cat([of_chosen, valid.gather(1, ids)], dim=1)
    as_words = [chosen[:, None].to(torch.int32), ids.to(torch.int32), values.view(torch.int32), rank.to(torch.int32)]
    return torch.cat(as_words, dim=1)


def _most_likely(logprobs: torch.Tensor, k: int) -> torch.Tensor:
    """Ids [N, k] of the largest values, falling, ties by lowest id."""
    if k == 0:
        return torch.zeros(logprobs.shape[0], 0, dtype=torch.int64, device=logprobs.device)
    bits = (logprobs + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    complement = _LOW_WORD - torch.arange(logprobs.shape[1], device=logprobs.device)
    keys = (rising << 32) | complement
    largest = keys.sort(dim=-1, descending=True).values[:, :k] if k >= _SORT_FROM else keys.topk(k).values
    return _LOW_WORD - (largest & _LOW_WORD)


def _parts(num_rows: int, num_columns: int, at_once: int) -> Iterator[slice]:
    """Rows of at most so many elements together, at least one."""
    size = max(1, at_once // num_columns)
    return (slice(begin, min(begin + size, num_rows)) for begin in range(0, num_rows, size))


@dataclasses.dataclass(frozen=True, slots=True)
class LogprobRows:
    """Which of a batch's rows are reported, made once for the batch.

    Rows are computed in groups of similar k, so that one request that wants the whole vocabulary does not make all rows
    that wide.

    Attributes:
        rows: [Q] rising, on the host.
        numbers: [Q] how many of the most likely tokens each reports.
        groups: (rows on the device, their places in `rows`, the largest k among them).
    """

    rows: Ids
    numbers: Ids
    groups: list[tuple[torch.Tensor, Ids, int]]

    @classmethod
    def make(cls, wanted: Sequence[tuple[int, int]], num_columns: int, device: torch.device) -> "LogprobRows":
        """`wanted`: (row, k or ALL), rows rising."""
        rows = np.array([row for row, _ in wanted], np.int64)
        numbers = np.array([number_of(k, num_columns) for _, k in wanted], np.int64)
        sizes = np.array([int(number).bit_length() for number in numbers])
        places = [np.flatnonzero(sizes == size) for size in np.unique(sizes)]
        return cls(rows, numbers, [(upload(rows[each], device), each, int(numbers[each].max())) for each in places])


def number_of(k: int, num_columns: int) -> int:
    """How many tokens k or ALL stands for."""
    return num_columns if k == ALL else min(k, num_columns)


class SampledLogprobs:
    """Words of a step's reported rows, still on the device."""

    def __init__(self, asked: LogprobRows, logits: torch.Tensor, token_ids: torch.Tensor, num_columns: int) -> None:
        """Args:
        asked: which rows.
        logits: [S, columns], the network's own.
        token_ids: [S] what was sampled.
        num_columns: see `measure`.
        """
        self._asked = asked
        self._shapes: list[tuple[int, int]] = []
        self.words: list[torch.Tensor] = []
        for rows, _, k in asked.groups:
            words = measure(logits.index_select(0, rows), token_ids.index_select(0, rows), num_columns, k)
            self.words.append(words.flatten())
            self._shapes.append((words.shape[0], words.shape[1]))

    def read(self, words: Words, is_void: npt.NDArray[np.bool_]) -> tuple[Ids, Logprobs | None]:
        """Rows that are reported, and their log probabilities.

        Args:
            words: all of `self.words`, one after another, on the host.
            is_void: [S]; rows without a token, which are not reported.
        """
        sizes = [rows * width for rows, width in self._shapes]
        blocks = np.split(words, np.cumsum(sizes)[:-1])
        lines = [line for block, shape in zip(blocks, self._shapes, strict=True) for line in block.reshape(shape)]
        places = np.concatenate([places for _, places, _ in self._asked.groups])
        line_of = dict(zip(places.tolist(), lines, strict=True))
        kept = [place for place, row in enumerate(self._asked.rows) if not is_void[row]]
        if not kept:
            return self._asked.rows[:0], None
        return self._asked.rows[kept], _message([line_of[place] for place in kept], self._asked.numbers[kept])


@dataclasses.dataclass(frozen=True, slots=True)
class PromptPart:
    """Prompt tokens of one request that a step's hidden states predict.

    Attributes:
        row: index into the step's slots.
        slot: the request's.
        start, count: the tokens reported, [start, start + count) of the prompt.
        first: which of the step's tokens predicts token `start`; the next one predicts the next.
        k: how many of the most likely tokens each reports, or ALL.
    """

    row: int
    slot: int
    start: int
    count: int
    first: int
    k: int


class PendingPromptLogprobs:
    """One part on its way to the host."""

    def __init__(self, part: PromptPart, k: int, words: list[Download]) -> None:
        self._part = part
        self._k = k
        self._words = words

    def wait(self) -> PromptLogprobs:
        """The message, once the device has it."""
        lines = [line for words in self._words for line in words.wait()]
        return PromptLogprobs(self._part.row, self._part.start, _message(lines, np.full(len(lines), self._k)))


def prompt_logprobs(
    parts: Sequence[PromptPart],
    hidden: torch.Tensor,
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
    token_ids: torch.Tensor,
    num_columns: int,
) -> list[PendingPromptLogprobs]:
    """Log probabilities of prompt tokens; what is computed at once leaves the device before the next is.

    Args:
        parts: what is to be reported.
        hidden: [T, hidden_size], of the step's tokens.
        compute_logits: [N, hidden_size] → [N, columns].
        token_ids: [num_slots, max_model_len], all known tokens.
        num_columns: see `measure`.
    """
    pending = []
    for part in parts:
        k = number_of(part.k, num_columns)
        chosen = token_ids[part.slot, part.start : part.start + part.count].to(torch.int64)
        states = hidden[part.first : part.first + part.count]
        words = [
            Download(measure(compute_logits(states[rows]), chosen[rows], num_columns, k))
            for rows in _parts(part.count, num_columns, _MAX_ELEMENTS)
        ]
        pending.append(PendingPromptLogprobs(part, k, words))
    return pending


def _message(lines: Sequence[Words], numbers: Ids) -> Logprobs:
    """Lines of words as a message; each line may have been computed for more tokens than its number."""
    ids, values = [], []
    for line, number in zip(lines, numbers.tolist(), strict=True):
        width = (len(line) - 1) // 2
        ids.append(line[: number + 1])
        values.append(line[width : width + number + 1])
    return Logprobs(
        counts=(numbers + 1).astype("<i4").tobytes(),
        token_ids=np.concatenate(ids).astype("<i4").tobytes(),
        values=np.concatenate(values).astype("<i4").tobytes(),
        ranks=np.array([line[-1] for line in lines], "<i4").tobytes(),
    )

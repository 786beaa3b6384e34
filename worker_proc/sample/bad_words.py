"""Token sequences that must not appear in an answer.

The last token of a sequence is forbidden where the answer ends with all of it but that token. The prompt does not
count: a sequence may begin there, and its rest may follow.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from folovllm.worker_proc.host_to_device import upload
from folovllm.worker_proc.sample.constraints import Precedence, RowTokens, forbid
from folovllm.worker_proc.wire_fields import Ids

_ANY = -1


@dataclasses.dataclass(frozen=True, slots=True)
class BadWordRows:
    """The forbidden sequences of a batch's rows, made once.

    U places (row, token) can be forbidden, by one or several of W sequences; M is the longest sequence's length less 1.

    Attributes:
        rows, tokens: [U] the places.
        word_rows: [W] each sequence's row.
        word_places: [W] which of the places it forbids.
        heads: [W, M] its tokens but the last, at the right end; -1 left of them.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    word_rows: torch.Tensor
    word_places: torch.Tensor
    heads: torch.Tensor

    @classmethod
    def make(cls, words: Sequence[tuple[int, Ids]], device: torch.device) -> "BadWordRows":
        """`words`: (row, sequence of at least one token)."""
        longest = max(len(word) for _, word in words) - 1
        heads = np.full((len(words), longest), _ANY, np.int64)
        for head, (_, word) in zip(heads, words, strict=True):
            head[longest - len(word) + 1 :] = word[:-1]
        lasts = np.array([(row, word[-1]) for row, word in words], np.int64)
        places, place_of = np.unique(lasts, axis=0, return_inverse=True)
        rows, tokens = upload(places.T.copy(), device)
        word_rows, word_places = upload(np.stack([lasts[:, 0], place_of.reshape(-1)]), device)
        return cls(rows, tokens, word_rows, word_places, upload(heads, device))


class BadWords:
    """The forbidden sequences in a step."""

    precedence = Precedence.BAD_WORDS

    def __init__(self, words: BadWordRows, tokens: RowTokens) -> None:
        self._words = words
        self._tokens = tokens

    def apply(self, logits: torch.Tensor) -> None:
        words = self._words
        if words.heads.shape[1] == 0:
            forbid(logits, words.rows, words.tokens)
            return
        num_matches = torch.zeros_like(words.rows).index_add_(0, words.word_places, self._matches().to(torch.int64))
        old = logits[words.rows, words.tokens]
        logits[words.rows, words.tokens] = old.masked_fill_(num_matches > 0, -math.inf)

    def _matches(self) -> torch.Tensor:
        """[W] whether the answers end with all but the last token of the sequences."""
        words, tokens = self._words, self._tokens
        slots, ends, begins = (
            each.index_select(0, words.word_rows) for each in (tokens.slots, tokens.num_known, tokens.num_prompt)
        )
        longest = words.heads.shape[1]
        places = ends[:, None] - longest + torch.arange(longest, device=ends.device)
        last = tokens.token_ids[slots[:, None], places.clamp_min(0)]
        equal = (last == words.heads) & (places >= begins[:, None])
        return (equal | (words.heads == _ANY)).all(dim=1)

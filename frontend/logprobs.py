"""Log probabilities as the core reports them → `Logprob` objects, made only when somebody takes them.

A place is one token, chosen or of the prompt, with its alternatives. Until it is asked for it stays as the bytes it
came in, 8 for each alternative; as objects it is thirty times that.

A token's text alone is not always text: with a byte-level tokenizer a character may be spread over several tokens. Then
the token that completes the character is given all of it, and those before it the empty text, as in vLLM. What belongs
to a character is known from the chosen tokens before; an alternative that does not continue it is shown by itself.
"""

import codecs
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

from folovllm.common.errors import ProtocolError
from folovllm.common.messages.core_worker import Logprobs
from folovllm.frontend import int32
from folovllm.frontend.outputs import Logprob
from folovllm.frontend.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_BLANK = "▁"  # sentencepiece's spelling of it
_MAX_HELD_IDS = 3  # a character has at most four bytes: the fourth completes it


class Place(NamedTuple):
    """One token and its alternatives, as bytes of the message: the chosen token first, then the most likely ones."""

    token_ids: bytes
    values: bytes
    rank: int


def places(message: Logprobs) -> Iterator[Place]:
    """The places of a message, in order. Raises ProtocolError before the first one if the fields do not fit."""
    counts, ranks = int32.unpack(message.counts), int32.unpack(message.ranks)
    fits = len(counts) == len(ranks) and min(counts, default=1) > 0
    if not fits or not len(message.token_ids) == len(message.values) == 4 * sum(counts):
        raise ProtocolError(f"the core sent log probabilities of {len(counts)} tokens whose fields do not fit")
    return _places(message, counts, ranks)


def _places(message: Logprobs, counts: Sequence[int], ranks: Sequence[int]) -> Iterator[Place]:
    begin = 0
    for count, rank in zip(counts, ranks, strict=True):
        end = begin + 4 * count
        yield Place(message.token_ids[begin:end], message.values[begin:end], rank)
        begin = end


class TokenLogprobs:
    """The log probabilities of consecutive tokens.

    Attributes:
        cumulative: sum over the tokens themselves.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """tokenizer: None: no text is shown."""
        self.cumulative = 0.0
        self._texts = None if tokenizer is None else _texts(tokenizer)
        self._places: list[Place] = []
        self._made: list[dict[int, Logprob]] = []

    def __len__(self) -> int:
        return len(self._places)

    def append(self, place: Place) -> None:
        self._places.append(place)
        self.cumulative += _first_value(place)

    def cut(self, count: int) -> None:
        """Drops all but the first `count`."""
        if count > len(self._places):
            raise ProtocolError(f"the core reported {count} tokens and log probabilities of {len(self._places)}")
        for place in self._places[count:]:
            self.cumulative -= _first_value(place)
        del self._places[count:], self._made[count:]

    def extend(self, start: int, new: Iterable[Place]) -> None:
        """Takes places from index `start` on. Those there are already, computed anew after a preemption, stay."""
        known = len(self._places) - start
        if known < 0:
            raise ProtocolError(f"the core left out log probabilities {len(self._places)} to {start - 1} of a prompt")
        for place in islice(new, known, None):
            self.append(place)

    def made(self, start: int = 0) -> list[dict[int, Logprob]]:
        """From index `start` on, id → Logprob: the token's own first, then its alternatives from rank 1."""
        while len(self._made) < len(self._places):
            self._made.append(self._make(self._places[len(self._made)]))
        return self._made[start:] if start else self._made

    def _make(self, place: Place) -> dict[int, Logprob]:
        ids = int32.unpack(place.token_ids)
        values = struct.unpack(f"<{len(ids)}f", place.values)
        texts = [None] * len(ids) if self._texts is None else [self._texts.text(token_id) for token_id in ids]
        made = {ids[0]: Logprob(values[0], place.rank, texts[0])}
        for rank, (token_id, value, text) in enumerate(zip(ids[1:], values[1:], texts[1:], strict=True), 1):
            made[token_id] = Logprob(value, rank, text)
        if self._texts is not None:
            self._texts.take(ids[0])
        return made


def _first_value(place: Place) -> float:
    (value,) = struct.unpack_from("<f", place.values)
    return float(value)


class _Texts(Protocol):
    def text(self, token_id: int) -> str:
        """The text that this token would add behind those taken."""

    def take(self, token_id: int) -> None:
        """This token was the one."""


def _texts(tokenizer: Tokenizer) -> _Texts:
    return _ByteTexts(tokenizer) if tokenizer.byte_level else _WindowTexts(tokenizer)


class _ByteTexts:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._unfinished = b""

    def text(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id)
        text = data.decode("utf-8", "replace")
        if _REPLACEMENT in text:
            text, _ = codecs.utf_8_decode(self._unfinished + data, "replace", False)
        return text

    def take(self, token_id: int) -> None:
        data = self._unfinished + self._tokenizer.token_bytes(token_id)
        _, used = codecs.utf_8_decode(data, "replace", False)
        self._unfinished = data[used:]


class _WindowTexts:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def text(self, token_id: int) -> str:
        text = self._decode([token_id])
        if text.endswith(_REPLACEMENT):
            together = self._decode([*self._held, token_id])
            return "" if together.endswith(_REPLACEMENT) else together
        (piece,) = self._tokenizer.convert_ids_to_tokens([token_id])
        blanks = len(piece) - len(piece.lstrip(_BLANK)) if piece else 0  # a leading one is lost in decoding
        return " " * blanks + text.lstrip(" ") if blanks else text

    def take(self, token_id: int) -> None:
        if not self._decode([token_id]).endswith(_REPLACEMENT):
            self._held = []
            return
        held = [*self._held, token_id]
        self._held = held[-_MAX_HELD_IDS:] if self._decode(held).endswith(_REPLACEMENT) else []

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

"""A grammar that needs no vocabulary: output token i must leave the rest i % 3 when it is divided by 3."""

import numpy as np

_MODULUS = 3


class SimulatedGrammar:
    """As the scheduler sees it. `is_late`: masks come when `fill` is called, and not at once."""

    def __init__(self, num_ids: int, *, is_late: bool = False) -> None:
        self.mask: bytes | None = None
        self.taken: list[int] = []
        self._num_ids = num_ids
        self._is_late = is_late
        self.fill()

    def advance(self, token_id: int) -> None:
        assert self.mask is not None, "moved on before its mask was there"
        assert token_id % _MODULUS == len(self.taken) % _MODULUS, "a token that the mask forbids"
        self.taken.append(token_id)
        self.mask = None
        if not self._is_late:
            self.fill()

    def fill(self) -> None:
        allowed = np.arange(self._num_ids) % _MODULUS == len(self.taken) % _MODULUS
        allowed = np.pad(allowed, (0, -self._num_ids % 32))
        self.mask = np.packbits(allowed, bitorder="little").tobytes()


def fitting(token_id: int, index: int) -> int:
    """The token in place of `token_id`, if it is output token `index` under the grammar."""
    return token_id - (token_id - index) % _MODULUS if token_id >= _MODULUS else index % _MODULUS


def masked(token_id: int, mask: bytes) -> int:
    """What a worker that wants `token_id` samples under a mask: the nearest allowed one that is not above it."""
    allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
    return int(allowed[max(int(np.searchsorted(allowed, token_id, side="right")) - 1, 0)])

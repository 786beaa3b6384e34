"""Log probabilities of the simulated worker: numbers that follow from the context; packing them and unpacking."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from folovllm.common.messages.core_worker import Logprobs

VOCABULARY = 97


class Place(NamedTuple):
    """One token: its entries (token, value), the chosen one first, and its rank."""

    entries: list[tuple[int, float]]
    rank: int


def place(context: Sequence[int], chosen: int, number: int) -> Place:
    """What is reported of `chosen` after `context`, with `number` of the most likely tokens (-1: all)."""
    key = 1
    for token_id in context:
        key = (key * 7 + token_id + 1) % 1_000_003
    values = {token_id: -((key * (token_id + 3)) % 509) / 8 for token_id in {*range(VOCABULARY), chosen}}
    order = sorted(range(VOCABULARY), key=lambda token_id: (-values[token_id], token_id))
    top = order if number == -1 else order[:number]
    entries = [(token_id, values[token_id]) for token_id in (chosen, *top)]
    return Place(entries, sum(value >= values[chosen] for value in values.values()))


def places_of(tokens: Sequence[int], start: int, end: int, number: int) -> list[Place]:
    """Those of tokens [start, end) of a sequence."""
    return [place(tokens[:position], tokens[position], number) for position in range(start, end)]


def pack(places: Sequence[Place]) -> Logprobs:
    entries = [entry for one in places for entry in one.entries]
    return Logprobs(
        np.array([len(one.entries) for one in places], "<i4").tobytes(),
        np.array([token_id for token_id, _ in entries], "<i4").tobytes(),
        np.array([value for _, value in entries], "<f4").tobytes(),
        np.array([one.rank for one in places], "<i4").tobytes(),
    )


def unpack(logprobs: Logprobs | None) -> list[Place]:
    if logprobs is None:
        return []
    counts, ids, ranks = (
        np.frombuffer(field, "<i4").tolist() for field in (logprobs.counts, logprobs.token_ids, logprobs.ranks)
    )
    entries = iter(zip(ids, np.frombuffer(logprobs.values, "<f4").tolist(), strict=True))
    places = [Place([next(entries) for _ in range(count)], rank) for count, rank in zip(counts, ranks, strict=True)]
    assert next(entries, None) is None
    return places

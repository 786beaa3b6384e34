"""Byte fields of a step as arrays; and what is said of numbers that do not fit."""

from typing import Final

import numpy as np
import numpy.typing as npt

from folovllm.common.errors import ProtocolError

Ids = npt.NDArray[np.int64]

_INT32_BYTES: Final = 4


def ints(field: bytes, name: str) -> Ids:
    """Little-endian int32 bytes as int64. Raises ProtocolError where they are no whole number of entries."""
    if len(field) % _INT32_BYTES:
        raise ProtocolError(f"{name}: {len(field)} bytes are no whole number of int32")
    return np.frombuffer(field, "<i4").astype(np.int64)


def check_range(values: Ids, low: int, end: int, name: str) -> None:
    """Raises ProtocolError, with the first value at fault, unless all are in [low, end)."""
    if len(values) and not (low <= int(values.min()) and int(values.max()) < end):
        wrong = values[(values < low) | (values >= end)]
        raise ProtocolError(f"{name}: {int(wrong[0])} is out of range; it must be {low} to {end - 1}")


def check_each(slots: Ids, fine: npt.NDArray[np.bool_], what: str) -> None:
    """Raises ProtocolError for the first of `slots` that is not fine."""
    if not fine.all():
        raise ProtocolError(f"slot {int(slots[~fine][0])} {what}")


def check(fine: bool, message: str) -> None:
    """Raises ProtocolError unless `fine`."""
    if not fine:
        raise ProtocolError(message)

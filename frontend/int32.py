"""Lists of ints ↔ the little-endian int32 bytes in which messages carry them. For short lists quicker than numpy."""

import struct
from collections.abc import Sequence


def pack(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def unpack(data: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(data) // 4}i", data))

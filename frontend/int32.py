"""Lists of ints ↔ the little-endian int32 bytes in which messages carry them. For short lists quicker than numpy."""

import struct
from collections.abc import Sequence

from folovllm.common.errors import ProtocolError


def pack(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def unpack(data: bytes) -> list[int]:
    """Raises ProtocolError where the bytes are no whole number of entries."""
    if len(data) % 4:
        raise ProtocolError(f"{len(data)} bytes are no whole number of int32")
    return list(struct.unpack(f"<{len(data) // 4}i", data))

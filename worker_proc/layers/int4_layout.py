"""How 4-bit weights lie in memory for the kernels of `kernels.cpu.int4`, which draws the picture."""

import dataclasses
from typing import Final

LANES: Final = 16  # outputs of a block
PER_WORD: Final = 8
MIDDLE: Final = 8  # what is taken off every number, and off zeros as they are stored
WORD_BYTES: Final = 4
SCALE_BYTES: Final = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Int4Layout:
    """How a block is built.

    Attributes:
        group_size: inputs that share a scale, a multiple of 8; the last group may be smaller.
        asymmetric: whether there are zeros.
        kind: of the activations beside it, "bfloat16".
    """

    group_size: int
    asymmetric: bool
    kind: str = "bfloat16"

    @property
    def width(self) -> int:
        """Outputs of a block."""
        return LANES

    def num_groups(self, inputs: int) -> int:
        return -(-inputs // self.group_size)

    def block_bytes(self, inputs: int) -> int:
        """Of a whole block."""
        words = inputs // PER_WORD * LANES * WORD_BYTES
        return words + self.num_groups(inputs) * LANES * SCALE_BYTES * (2 if self.asymmetric else 1)

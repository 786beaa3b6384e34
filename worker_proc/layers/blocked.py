"""Where oneDNN has put the numbers of a weight that it packed, so that kernels of our own can read the same memory.

torch shows a packed weight as an opaque tensor. What lies in it is simple on every x86 processor with products in 16
bits: blocks of 16, 32, 48 or 64 outputs one after another; in a block the inputs in order, single or in pairs, and for
each of them the block's outputs side by side (oneDNN's AB16b32a2b and its relatives). Which of these it is, is found by
looking: sizes must fit and the numbers must stand where they are expected. If none fits, nothing is read.
"""

import ctypes
import dataclasses

import torch

from folovllm.worker_proc.layers.int4_layout import Int4Layout

_WIDTHS = (16, 32, 48, 64)
_MOST_PADDING = 64  # inputs that a block may be filled up with


@dataclasses.dataclass(frozen=True, slots=True)
class BlockLayout:
    """How a block is built.

    Attributes:
        width: outputs of a block.
        group: inputs that lie side by side for each output, 1 or 2.
        kind: "bfloat16" or "float16".
    """

    width: int
    group: int
    kind: str


@dataclasses.dataclass(frozen=True, slots=True)
class BlockedWeight:
    """A weight [out_features, in_features] as [blocks, padded_in / group, width, group]; what is too much is 0.

    Attributes:
        address: of its first number; valid as long as the packed tensor lives.
        out_features, in_features: as in the network.
        padded_in: inputs with their padding, a multiple of `layout.group`.
        layout: how each block is built.
    """

    address: int
    out_features: int
    in_features: int
    padded_in: int
    layout: BlockLayout | Int4Layout

    @property
    def num_blocks(self) -> int:
        return -(-self.out_features // self.layout.width)


def look_into(packed: torch.Tensor, weight: torch.Tensor) -> BlockedWeight | None:
    """The layout of `packed`, which oneDNN has made of `weight` [out, in] (16-bit); None if it is none of these."""
    address, num_bytes = int(torch.ops.mkldnn.data_ptr(packed)), int(torch.ops.mkldnn._nbytes(packed))
    numbers = (ctypes.c_int16 * (num_bytes // 2)).from_address(address)
    memory = torch.frombuffer(numbers, dtype=weight.dtype)
    kind = str(weight.dtype).removeprefix("torch.")
    for width in _WIDTHS:
        padded_out = -(-weight.shape[0] // width) * width
        padded_in, rest = divmod(len(memory), padded_out)
        for group in (2, 1):
            fits = rest == 0 and 0 <= padded_in - weight.shape[1] < _MOST_PADDING and padded_in % group == 0
            if fits and _agrees(memory.view(-1, padded_in // group, width, group), weight):
                out_features, in_features = weight.shape
                return BlockedWeight(address, out_features, in_features, padded_in, BlockLayout(width, group, kind))
    return None


def _agrees(blocks: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether some blocks as a whole, and the first and last inputs of all, are those of `weight`."""
    num_blocks, groups, width, group = blocks.shape
    for block in sorted({0, num_blocks // 2, num_blocks - 1}):
        rows = weight[block * width : (block + 1) * width]
        expected = weight.new_zeros(width, groups * group)
        expected[: rows.shape[0], : rows.shape[1]] = rows
        if not torch.equal(blocks[block].transpose(0, 1).reshape(width, -1), expected):
            return False
    last = (weight.shape[1] - 1) // group
    for place, column in ((0, 0), (last, last * group)):
        outputs = blocks[:, place, :, 0].reshape(-1)[: weight.shape[0]]
        if not torch.equal(outputs, weight[:, column]):
            return False
    return True

"""How 4-bit weights lie in memory for the kernels of `kernels.triton.int4_*`, and their repacking at load.

A row of the weight is one output's, cut into blocks of 8 · c inputs, c the *chunk*; a block is c words of 32 bits:

    word i of a block, i even:  inputs i and i + 1 of chunks 0 to 3     bits  0-15: input i,     4 bits a chunk
    word i + 1:                 inputs i and i + 1 of chunks 4 to 7     bits 16-31: input i + 1, 4 bits a chunk

So a tile of words gives eight tiles of numbers, each of c *neighbouring* inputs: activations are read as they lie, and
since a chunk lies within one group, a scale belongs to a whole row of such a tile. The two inputs in a word's halves
become a pair of 16-bit floats by one shift, one mask-and-or and one packed operation (`kernels.triton.int4_numbers`).

Scales and zeros lie by groups, [G, N], as programs read them: many outputs of a group at once.

Prior art: floats by setting an exponent's bits, and numbers interleaved for it: Kim and others 2022, arXiv:2211.10017.
"""

import dataclasses
from typing import Final

import torch
import torch.nn.functional as F

from folovllm.worker_proc.quantization.storage import InGroups, Quantized

MIDDLE: Final = 8  # what the kernels take off every number, and off zeros
CHUNKS: Final = 8  # of a block: the numbers of a word
_CHUNK_SIZES: Final = (128, 64, 32, 16)  # tensor cores multiply 16 inputs at a time
_HALF_BITS: Final = 16
_BITS: Final = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Int4Words:
    """A weight [N, K].

    Attributes:
        words: int32 [N, blocks · chunk]; inputs from K on are padding.
        scales: float16 [G, N].
        zeros: uint8 [G, N]; None if all are 8.
        order: int32 [K], which input stands where; None for their own order.
        in_features: K.
        group_size: inputs that share a scale, in that order; the last group may be smaller.
        chunk: inputs of a chunk.
    """

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None
    in_features: int
    group_size: int
    chunk: int

    @property
    def out_features(self) -> int:
        """N."""
        return self.words.shape[0]

    @property
    def num_groups(self) -> int:
        """G."""
        return self.scales.shape[0]

    @property
    def num_blocks(self) -> int:
        """Blocks of a row."""
        return self.words.shape[1] // self.chunk

    @property
    def num_bytes(self) -> int:
        """What the weight takes in memory."""
        optional = (tensor for tensor in (self.zeros, self.order) if tensor is not None)
        return self.words.nbytes + self.scales.nbytes + sum(tensor.nbytes for tensor in optional)


def choose_chunk(in_features: int, group_size: int) -> int | None:
    """The chunk that pads least, the largest of those; None if no chunk divides a group."""
    fitting = [size for size in _CHUNK_SIZES if group_size % size == 0]
    return min(fitting, key=lambda size: (_padded(in_features, size), -size), default=None)


def pack_words(weight: Quantized) -> Int4Words | None:
    """The weight in words, on the device its numbers are on; None if its groups or scales are of an odd kind."""
    grouped = InGroups.of(weight)
    if grouped is None:
        return None
    in_features, device = grouped.numbers.shape[0], grouped.numbers.device
    chunk = choose_chunk(in_features, grouped.group_size)
    if chunk is None:
        return None
    asymmetric = bool((weight.zeros != MIDDLE).any())
    return Int4Words(
        _words(grouped.numbers, chunk),
        grouped.scales.to(device),
        weight.zeros.contiguous().to(device) if asymmetric else None,
        None if grouped.order is None else grouped.order.to(device, torch.int32),
        in_features,
        grouped.group_size,
        chunk,
    )


def _words(numbers: torch.Tensor, chunk: int) -> torch.Tensor:
    """Numbers [K, N] → words [N, blocks · chunk]. Few operators: a model has hundreds of weights to be loaded."""
    in_features, out_features = numbers.shape
    missing = _padded(in_features, chunk) - in_features
    if missing:
        numbers = F.pad(numbers, (0, 0, 0, missing))
    fields = numbers.view(-1, 2, CHUNKS // 2, chunk // 2, 2, out_features)  # block, word, chunk, pair, half, output
    pairs = fields[..., 0, :].to(torch.int32) | fields[..., 1, :].to(torch.int32) << _HALF_BITS
    words = pairs[:, :, 0]
    for place in range(1, CHUNKS // 2):
        words = words | pairs[:, :, place] << _BITS * place
    return words.permute(3, 0, 2, 1).reshape(out_features, -1)  # output, block, pair, word


def _padded(in_features: int, chunk: int) -> int:
    block = CHUNKS * chunk
    return -(-in_features // block) * block

"""How GPTQ checkpoints store a weight, and its plain reading: the reference of everything that computes with it.

A weight [N, K] of N outputs and K inputs, at 4 bits (8: the same with 4 numbers a word):

    qweight  int32 [K / 8, N]   word (i, n), bits 4 j to 4 j + 3: the number of input 8 i + j
    qzeros   int32 [G, N / 8]   word (g, i), bits 4 j to 4 j + 3: the zero of group g and output 8 i + j
    scales   float [G, N]
    g_idx    int32 [K]          the group of each input; without it groups of equal size, in order

    weight[n, k] = scales[g, n] · (number[k, n] - zero[g, n])   with g = g_idx[k]

Zeros are from 0 to 15. Format `gptq` stores them minus one, modulo 16; `gptq_v2` as they are. How "minus one" treats a
zero of 0 depends on the writer: GPTQModel subtracts from all eight at once, as from one 32-bit number, so that the next
zero lends its one; others from each alone.
"""

import dataclasses

import torch

WORD_BITS = 32


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight [N, K] as numbers, zeros and scales.

    Attributes:
        numbers: uint8 [K, N].
        zeros: uint8 [G, N].
        scales: float [G, N], as stored.
        groups: int64 [K], the group of each input.

    Zeros, scales and groups may be on the CPU while the numbers are on a GPU: what is asked of them waits for nothing.
    """

    numbers: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [N, K]."""
        zeros, scales = (each[self.groups].to(self.numbers.device, dtype) for each in (self.zeros, self.scales))
        return ((self.numbers.to(dtype) - zeros) * scales).t().contiguous()


@dataclasses.dataclass(frozen=True)
class InGroups:
    """A weight's numbers with the inputs of each group together, groups in order: what kernels take.

    Attributes:
        numbers: uint8 [K, N].
        scales: float16 [G, N], where the weight's are.
        order: int64 [K], which input stands where; None for their own order; where the weight's groups are.
        group_size: inputs of a group; the last may be smaller.
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    order: torch.Tensor | None
    group_size: int

    @classmethod
    def of(cls, weight: Quantized) -> "InGroups | None":
        """The weight so; None if its groups are not of one size, or its scales no float16.

        Groups that no input belongs to are odd, too: kernels read scales of as many groups as the inputs fill.
        """
        inputs, groups = weight.numbers.shape[0], weight.groups
        size = int((groups == 0).sum())
        if size == 0 or weight.scales.shape[0] != -(-inputs // size):
            return None
        even = torch.arange(inputs, device=groups.device) // size
        scales = weight.scales.half()
        exact = weight.scales.float()
        if not torch.equal(scales.float(), exact) and not torch.allclose(scales.float(), exact, rtol=1e-3, atol=0.0):
            return None
        if torch.equal(groups, even):
            return cls(weight.numbers, scales, None, size)
        order = torch.argsort(groups, stable=True)
        if not torch.equal(groups[order], even):
            return None
        return cls(weight.numbers[order.to(weight.numbers.device)], scales, order, size)


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers [R, C] → words int32 [R · bits / 32, C], the first of each word's rows in its lowest bits."""
    per_word = WORD_BITS // bits
    split = values.to(torch.int64).unflatten(0, (-1, per_word))  # [words, rows of a word, C]
    shifts = torch.arange(0, WORD_BITS, bits, device=values.device)[:, None]
    return _as_int32((split << shifts).sum(1))


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_rows`: uint8."""
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)[:, None]
    fields: torch.Tensor = (words[:, None, :] >> shifts) & (2**bits - 1)
    return fields.flatten(0, 1).to(torch.uint8)


def pack_zeros(zeros: torch.Tensor, bits: int, *, minus_one: bool, borrows: bool = False) -> torch.Tensor:
    """Zeros [G, N] → qzeros int32 [G, N · bits / 32]; see the module's head for the two flags."""
    if minus_one and not borrows:
        zeros = (zeros.to(torch.int64) - 1) % 2**bits
    words = pack_rows(zeros.t(), bits).t().contiguous()
    return _as_int32(words.to(torch.int64) - _ones(bits)) if minus_one and borrows else words


def unpack_zeros(words: torch.Tensor, bits: int, *, minus_one: bool, borrows: bool = False) -> torch.Tensor:
    """The inverse of `pack_zeros`: uint8 [G, N]."""
    if minus_one and borrows:
        words = _as_int32(words.to(torch.int64) + _ones(bits))
    zeros = unpack_rows(words.t(), bits).t().contiguous()
    return (zeros + 1) & (2**bits - 1) if minus_one and not borrows else zeros


def _ones(bits: int) -> int:
    """A word of ones: 0x11111111 for 4 bits."""
    return sum(1 << shift for shift in range(0, WORD_BITS, bits))


def _as_int32(words: torch.Tensor) -> torch.Tensor:
    """int64 → int32, modulo 2³²."""
    return ((words + 2**31) % 2**32 - 2**31).to(torch.int32)

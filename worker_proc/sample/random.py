"""Random numbers without a generator: each is a hash of what it is drawn for.

`uniform(seed, sample_index, position)` gives the same number in any batch, after preemption, after a crash and on any
device, because nothing else goes in. The hash is the finalizer of SplitMix64 (Steele, Lea, Flood 2014), applied to
the seed and then to the counter. Integer arithmetic only: products wrap modulo 2^64 on the CPU as on CUDA, and a right
shift is made logical by a mask, so the bits agree everywhere.
"""

import torch

_STEP = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, odd; as a signed number
_MULTIPLY_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLY_2 = 0x94D049BB133111EB - 2**64
_MANTISSA_BITS = 52


def uniform(seed: torch.Tensor, sample_index: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """One number in the open interval (0, 1) per row, float64 [R].

    Args:
        seed: [R] int64, any value.
        sample_index: [R] int64 in [0, 2^31): which of a request's answers.
        position: [R] int64 in [0, 2^32): which output token of the answer.
    """
    counter = (sample_index << 32) | position
    bits = _mix(_mix(seed + _STEP) + counter * _STEP)
    top = (bits >> (64 - _MANTISSA_BITS)) & (2**_MANTISSA_BITS - 1)
    # Half a unit is added so that 0 never occurs; 52 bits and the half are exact in float64, so 1 never does either.
    number: torch.Tensor = (top.to(torch.float64) + 0.5) * 2.0**-_MANTISSA_BITS
    return number


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MULTIPLY_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MULTIPLY_2
    return x ^ ((x >> 31) & (2**33 - 1))

"""Reading 4-bit weights as `layers.int4_words` lays them out: what the kernels of `int4_*` share."""

import triton
import triton.language as tl

from folovllm.worker_proc.kernels.triton.pdl import prefetch
from folovllm.worker_proc.layers.int4_words import CHUNKS, MIDDLE

_CHUNKS, _MIDDLE = tl.constexpr(CHUNKS), tl.constexpr(MIDDLE)
_LINE = tl.constexpr(32)  # words of a cache line


def _assembly(magic: int, operation: str) -> str:
    """Two words to eight pairs of floats: the exponent that `magic` is, with four bits at its end, less the middle.

    `$0` to `$7` are the pairs of chunks 0 to 7, `$8` and `$9` the words.
    """
    lines = []
    for chunk in range(CHUNKS):
        word, shift = f"${CHUNKS + chunk // 4}", 4 * (chunk % 4)
        if shift:
            lines.append(f"shr.u32 t, {word}, {shift};")
            word = "t"
        lines.append(f"lop3.b32 t, {word}, 0x000F000F, {magic:#010x}, 0xEA;")  # (word & mask) | magic
        lines.append(operation.format(out=f"${chunk}"))
    return " ".join(["{ .reg .b32 t, one, less;", _CONSTANTS[magic], *lines, "}"])


_BFLOAT16, _FLOAT16 = 0x43004300, 0x64006400  # two numbers of 128, and of 1024: one unit is their last bit
_CONSTANTS = {
    _BFLOAT16: "mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308;",  # 1 and -136
    _FLOAT16: "mov.b32 less, 0x64086408;",  # 1032
}
# Ampere subtracts no pairs of bfloat16, but multiplies and adds them.
_UNPACK_BFLOAT16 = tl.constexpr(_assembly(_BFLOAT16, "fma.rn.bf16x2 {out}, t, one, less;"))
_UNPACK_FLOAT16 = tl.constexpr(_assembly(_FLOAT16, "sub.rn.f16x2 {out}, t, less;"))
_REGISTERS = tl.constexpr("=r," * CHUNKS + "r,r")


@triton.jit
def unpack(words, TYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """A tile of words [..., W] → eight tiles [..., W] of numbers - 8, those of chunks 0 to 7, of `TYPE`.

    ASSEMBLY: on CUDA, where a thread must hold neighbouring words; elsewhere operators do the same.
    """
    if ASSEMBLY:
        if TYPE == tl.bfloat16:  # noqa: SIM300 - what Triton compiles
            return tl.inline_asm_elementwise(
                _UNPACK_BFLOAT16, _REGISTERS, [words], dtype=(tl.bfloat16,) * 8, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                _UNPACK_FLOAT16, _REGISTERS, [words], dtype=(tl.float16,) * 8, is_pure=True, pack=2
            )
    else:
        return (
            _chunk(words, 0, TYPE),
            _chunk(words, 1, TYPE),
            _chunk(words, 2, TYPE),
            _chunk(words, 3, TYPE),
            _chunk(words, 4, TYPE),
            _chunk(words, 5, TYPE),
            _chunk(words, 6, TYPE),
            _chunk(words, 7, TYPE),
        )


@triton.jit
def _chunk(words, CHUNK: tl.constexpr, TYPE: tl.constexpr):
    shape: tl.constexpr = words.shape
    pairs = tl.reshape(words, shape[:-1] + [shape[-1] // 2, 2])  # noqa: RUF005 - Triton knows no stars
    first, second = tl.split(pairs)
    word = first if CHUNK < 4 else second
    low, high = (word >> 4 * (CHUNK % 4)) & 15, (word >> (16 + 4 * (CHUNK % 4))) & 15
    return (tl.reshape(tl.join(low, high), shape) - _MIDDLE).to(tl.float32).to(TYPE)


@triton.jit
def of_block(values, inside, block, stride, CHUNK: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_GROUPS: tl.constexpr):
    """A block's eight tiles of scales, or of zeros: `values` points to those of group 0."""
    return (
        _of_chunk(values, inside, block * 8, stride, CHUNK, GROUP_SIZE, NUM_GROUPS),
        _of_chunk(values, inside, block * 8 + 1, stride, CHUNK, GROUP_SIZE, NUM_GROUPS),
        _of_chunk(values, inside, block * 8 + 2, stride, CHUNK, GROUP_SIZE, NUM_GROUPS),
        _of_chunk(values, inside, block * 8 + 3, stride, CHUNK, GROUP_SIZE, NUM_GROUPS),
        _of_chunk(values, inside, block * 8 + 4, stride, CHUNK, GROUP_SIZE, NUM_GROUPS),
        _of_chunk(values, inside, block * 8 + 5, stride, CHUNK, GROUP_SIZE, NUM_GROUPS),
        _of_chunk(values, inside, block * 8 + 6, stride, CHUNK, GROUP_SIZE, NUM_GROUPS),
        _of_chunk(values, inside, block * 8 + 7, stride, CHUNK, GROUP_SIZE, NUM_GROUPS),
    )


@triton.jit
def _of_chunk(values, inside, chunk, stride, CHUNK: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_GROUPS: tl.constexpr):
    group = tl.minimum(chunk * CHUNK // GROUP_SIZE, NUM_GROUPS - 1)  # padding belongs to the last one
    return tl.load(values + group * stride, mask=inside, other=0)


@triton.jit
def prefetch_words(rows, first, COUNT: tl.constexpr, LINES: tl.constexpr):
    """Asks for COUNT words of each row from `first` on, without waiting; LINES: a power of two, room for them.

    Args:
        rows: [R, 1], pointers to rows of words.
        first: number of the first word.
    """
    at = first + tl.minimum(tl.arange(0, LINES) * _LINE, COUNT - 1)
    prefetch(rows + at[None, :])


@triton.jit
def prefetch_groups(values, stride, NUM_GROUPS: tl.constexpr, PADDED: tl.constexpr):
    """Asks for scales, or zeros, of all groups from the output on that `values` points to; PADDED: a power of two."""
    group = tl.minimum(tl.arange(0, PADDED), NUM_GROUPS - 1)
    prefetch(values + group * stride)

"""Reading of numbers: the assembly for CUDA, carried out here bit by bit."""

import pytest
import torch

from folovllm.worker_proc.layers.int4_words import pack_words
from folovllm.worker_proc.quantization.storage import Quantized

WORD = 2**32 - 1


def carry_out(assembly: str, words: tuple[int, int], dtype: torch.dtype) -> list[list[float]]:
    """The pairs that a thread makes of two words."""
    registers: dict[str, int] = {"$8": words[0] & WORD, "$9": words[1] & WORD}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def pair(name: str) -> torch.Tensor:
        halves = torch.tensor([value(name) & 0xFFFF, value(name) >> 16], dtype=torch.int32)
        return halves.to(torch.int16).view(dtype)

    for line in assembly.strip("{} ").split(";"):
        operation, _, rest = line.strip().partition(" ")
        target, *names = (name.strip() for name in rest.split(","))
        if operation == "mov.b32":
            registers[target] = value(names[0])
        elif operation == "shr.u32":
            registers[target] = value(names[0]) >> value(names[1])
        elif operation == "lop3.b32":
            assert names[3] == "0xEA"  # (a & b) | c
            registers[target] = (value(names[0]) & value(names[1])) | value(names[2])
        elif operation.endswith("16x2"):
            a, *others = (pair(name) for name in names)
            result = a * others[0] + others[1] if operation.startswith("fma") else a - others[0]
            low, high = (int(half) & 0xFFFF for half in result.view(torch.int16))
            registers[target] = high << 16 | low
        else:
            assert operation in (".reg", "")
    return [pair(f"${chunk}").tolist() for chunk in range(8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_assembly_makes_pairs_of_numbers(dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    from folovllm.worker_proc.kernels.triton import int4_numbers

    numbers = torch.randint(0, 16, (128, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one = torch.ones(1, 1)
    words = pack_words(Quantized(numbers, one.byte(), one, torch.zeros(128, dtype=torch.int64)))
    assert words is not None and words.chunk == 16
    name = "_UNPACK_BFLOAT16" if dtype == torch.bfloat16 else "_UNPACK_FLOAT16"
    assembly = vars(int4_numbers)[name].value
    for pair in range(8):
        two = int(words.words[0, 2 * pair]), int(words.words[0, 2 * pair + 1])
        expected = numbers[:, 0].view(8, 16)[:, 2 * pair : 2 * pair + 2].float() - 8
        assert carry_out(assembly, two, dtype) == expected.tolist()

import pytest
import torch

from folovllm.worker_proc.quantization.storage import Quantized, pack_rows, pack_zeros, unpack_rows, unpack_zeros
from tests.fakes.gptq_models import Format, pack_weight


def numbers(bits: int, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_and_its_inverse(bits: int) -> None:
    values = numbers(bits, 64, 24)
    words = pack_rows(values, bits)
    assert words.dtype == torch.int32 and words.shape == (64 * bits // 32, 24)
    assert torch.equal(unpack_rows(words, bits), values)
    zeros = numbers(bits, 3, 64)  # with zeros of 0 among them
    for minus_one in (False, True):
        for borrows in (False, True):
            stored = pack_zeros(zeros, bits, minus_one=minus_one, borrows=borrows)
            assert stored.shape == (3, 64 * bits // 32)
            assert torch.equal(unpack_zeros(stored, bits, minus_one=minus_one, borrows=borrows), zeros)


def test_minus_one_with_and_without_borrowing_differ_at_a_zero_of_0_only() -> None:
    zeros = torch.tensor([[0, 5, 8, 8, 8, 8, 8, 8]], dtype=torch.uint8)
    alone, together = (pack_zeros(zeros, 4, minus_one=True, borrows=borrows) for borrows in (False, True))
    assert f"{alone.item():x}" == "7777774f" and f"{together.item():x}" == "7777773f"
    zeros[0, 0] = 3
    alone, together = (pack_zeros(zeros, 4, minus_one=True, borrows=borrows) for borrows in (False, True))
    assert torch.equal(alone, together)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("order", ["even", "shuffled"])
@pytest.mark.parametrize("bits", [4, 8])
def test_reads_what_was_packed_number_by_number(bits: int, order: str, sym: bool) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    form = Format(bits=bits, sym=sym, order=order)
    packed = pack_weight(weight, form)
    stored = packed.tensors
    zeros = unpack_zeros(stored["qzeros"], bits, minus_one=True)
    read = Quantized(unpack_rows(stored["qweight"], bits), zeros, stored["scales"], stored["g_idx"].long())
    torch.testing.assert_close(read.dequantize(torch.float64), packed.plain)
    assert (packed.plain - weight).abs().max() < {4: 0.4, 8: 0.03}[bits]

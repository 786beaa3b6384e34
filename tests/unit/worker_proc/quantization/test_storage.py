import pytest
import torch

from folovllm.worker_proc.quantization.storage import (
    InGroups,
    Quantized,
    pack_rows,
    pack_zeros,
    unpack_rows,
    unpack_zeros,
)
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


def test_inputs_are_brought_together_by_groups() -> None:
    groups = torch.tensor([1, 0, 2, 1, 0])
    weight = Quantized(numbers(4, 5, 3), numbers(4, 3, 3), torch.ones(3, 3), groups)
    grouped = InGroups.of(weight)
    assert grouped is not None and grouped.order is not None
    assert grouped.order.tolist() == [1, 4, 0, 3, 2] and grouped.group_size == 2  # the last group has one input
    assert torch.equal(grouped.numbers, weight.numbers[grouped.order]) and grouped.scales.dtype == torch.float16
    in_order = InGroups.of(Quantized(weight.numbers, weight.zeros, weight.scales, torch.arange(5) // 2))
    assert in_order is not None and in_order.order is None and torch.equal(in_order.numbers, weight.numbers)


@pytest.mark.parametrize("groups", [[1, 1, 1, 1, 2], [0, 0, 0, 1, 2], [0, 0, 0, 0, 0]])
def test_groups_that_are_not_even(groups: list[int]) -> None:
    assert InGroups.of(Quantized(numbers(4, 5, 3), numbers(4, 3, 3), torch.ones(3, 3), torch.tensor(groups))) is None


def test_scales_that_are_no_float16() -> None:
    weight = Quantized(numbers(4, 4, 3), numbers(4, 2, 3), torch.full((2, 3), 1e-9), torch.arange(4) // 2)
    assert InGroups.of(weight) is None

import dataclasses

import pytest
import torch

from folovllm.worker_proc.layers.int4_words import Int4Words, choose_chunk, pack_words
from folovllm.worker_proc.quantization.storage import Quantized
from tests.fakes.int4_weights import random_weight


def packed(weight: Quantized) -> Int4Words:
    words = pack_words(weight)
    assert words is not None
    return words


def number(words: Int4Words, output: int, place: int) -> int:
    """The number that stands at a place of a row, read as the module's head draws it."""
    block, chunk, i = place // (8 * words.chunk), place // words.chunk % 8, place % words.chunk
    word = int(words.words[output, block * words.chunk + i // 2 * 2 + chunk // 4])
    return (word >> (16 * (i % 2) + 4 * (chunk % 4))) & 15


@pytest.mark.parametrize(
    ("inputs", "group_size", "chunk"), [(1024, 128, 128), (96, 64, 16), (576, -1, 16), (1536, 32, 32)]
)
@pytest.mark.parametrize("shuffled", [False, True])
def test_every_number_is_where_the_picture_says(inputs: int, group_size: int, chunk: int, shuffled: bool) -> None:
    weight = random_weight(3, inputs, group_size, sym=False, shuffled=shuffled)
    words = packed(weight)
    assert words.chunk == chunk and words.words.is_contiguous()
    assert (words.order is not None) == (shuffled and group_size != -1)
    order = range(inputs) if words.order is None else words.order.tolist()
    for output in range(3):
        row = [number(words, output, place) for place in range(inputs)]
        assert row == weight.numbers[order, output].tolist()
    groups = [min(place // words.group_size, words.num_groups - 1) for place in range(inputs)]
    assert groups == weight.groups[order].tolist()
    assert words.zeros is not None and torch.equal(words.zeros, weight.zeros)
    assert torch.equal(words.scales, weight.scales)


def test_symmetric_weights_store_no_zeros() -> None:
    words = packed(random_weight(8, 128, 32, sym=True))
    assert words.zeros is None and words.order is None
    assert words.num_bytes == words.words.nbytes + words.scales.nbytes


@pytest.mark.parametrize("sym", [True, False])
def test_a_layer_takes_at_most_028_times_what_it_takes_in_bfloat16(sym: bool) -> None:
    """Qwen3-0.6B's layers in groups of 128; nothing is drawn for so many numbers."""
    quantized = bfloat16 = 0
    for outputs, inputs in ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)):
        zeros = torch.full((inputs // 128, outputs), 8 if sym else 7, dtype=torch.uint8)
        numbers = torch.zeros(inputs, outputs, dtype=torch.uint8)
        words = packed(Quantized(numbers, zeros, torch.ones(zeros.shape), torch.arange(inputs) // 128))
        quantized += words.num_bytes
        bfloat16 += 2 * outputs * inputs
    assert 0.25 < quantized / bfloat16 < 0.28


def test_chunks() -> None:
    """Within a group, with as little padding as can be; as large as that leaves them."""
    assert [choose_chunk(inputs, 128) for inputs in (1024, 3072, 896, 4864, 11008)] == [128, 128, 16, 32, 32]
    assert [choose_chunk(3072, size) for size in (16, 48, 96, 1024)] == [16, 16, 32, 128]
    assert choose_chunk(1024, 24) is None


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("inputs", "group_size"), [(1024, 128), (96, 64)])
def test_packing_waits_for_no_device(inputs: int, group_size: int, shuffled: bool) -> None:
    """Numbers of the device meta have no values: an operator that has to know one raises an error."""
    weight = random_weight(16, inputs, group_size, sym=False, shuffled=shuffled)
    far = dataclasses.replace(weight, numbers=weight.numbers.to("meta"))
    words, near = packed(far), packed(weight)
    for name in ("words", "scales", "zeros", "order"):
        ours, expected = getattr(words, name), getattr(near, name)
        assert (ours is None) == (expected is None), name
        if ours is not None:
            assert (ours.device.type, ours.shape, ours.dtype) == ("meta", expected.shape, expected.dtype), name


def test_what_the_kernels_do_not_take() -> None:
    assert pack_words(random_weight(8, 72, 24, sym=True)) is None
    uneven = random_weight(8, 64, 16, sym=True)
    uneven.groups[0] = 1
    assert pack_words(uneven) is None

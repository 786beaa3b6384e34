"""Products of a few rows with a weight in blocks, against torch's in float64."""

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llvmlite", reason="kernels for the CPU are compiled by llvmlite")

from folovllm.worker_proc.kernels.cpu.compiled import Compiled, prepare
from folovllm.worker_proc.kernels.cpu.gemv import ROW_COUNTS, ProductShape, row_count
from folovllm.worker_proc.kernels.cpu.llvm import COUNTER_LINE, I64, Kernel, counters
from folovllm.worker_proc.kernels.cpu.network import HeadProduct, padded_bias
from folovllm.worker_proc.kernels.cpu.team import Team, find_team
from folovllm.worker_proc.layers.blocked import BlockedWeight, BlockLayout
from tests.fakes.blocked import pack_by_hand

# (outputs, inputs, width of a block, group of inputs, type)
CASES = [
    (96, 64, 32, 2, torch.bfloat16),
    (70, 48, 32, 2, torch.bfloat16),
    (5, 16, 16, 2, torch.bfloat16),
    (130, 80, 64, 2, torch.bfloat16),
    (100, 64, 48, 2, torch.bfloat16),
    (70, 48, 64, 1, torch.float16),
    (70, 48, 32, 2, torch.float16),
    (40, 32, 16, 1, torch.bfloat16),
]


@pytest.fixture(scope="module")
def team() -> Team:
    found = find_team()
    if found is None:
        pytest.skip("this torch does not use GNU's OpenMP")
    prepare()
    return found


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_threads_draw_their_own_shares_first_and_then_help_the_others() -> None:
    prepare()
    k = Kernel("draws")
    with k.drawn(k.argument(0), k.argument(1), (k.argument(2), k.integer(3))) as index:
        place = k.load(k.argument(3), k.integer(0), I64)
        k.store(index, k.argument(3), k.sum(place, k.integer(1)), I64)
        k.store(k.sum(place, k.integer(1)), k.argument(3), k.integer(0), I64)
    code = Compiled(k)
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code.address)

    def drawn_by(thread: int, count: int, memory: np.ndarray[Any, np.dtype[np.int64]]) -> list[int]:
        found = np.zeros(count + 1, np.int64)
        arguments = np.array([count, memory.ctypes.data, thread, found.ctypes.data], np.int64)
        run(arguments.ctypes.data)
        return [int(index) for index in found[1 : found[0] + 1]]

    for count in (0, 1, 7, 30):
        memory = counters(3)
        assert memory.ctypes.data % COUNTER_LINE == 0 and not memory.any()
        middle = list(range(count // 3, count * 2 // 3))
        own, rest = drawn_by(1, count, memory), drawn_by(0, count, memory)
        assert own[: len(middle)] == middle and sorted(own) == list(range(count)) and rest == []
        memory = counters(3)
        memory[0] = 2  # of the first thread's share two are gone
        assert drawn_by(2, count, memory) == [*range(count * 2 // 3, count), *range(2, count // 3), *middle]


def test_threads_shares_are_all_of_the_work_and_as_equal_as_can_be() -> None:
    prepare()
    k = Kernel("shares")
    with k.loop(k.integer(0), k.argument(1)) as thread:
        for place, value in enumerate(k.share(k.argument(0), thread, k.argument(1))):
            k.store(value, k.argument(2), k.sum(k.product(thread, k.integer(2)), k.integer(place)), I64)
    code = Compiled(k)
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code.address)
    for count in (0, 1, 7, 64):
        for threads in (1, 2, 5):
            shares = np.full((threads, 2), -1, np.int64)
            arguments = np.array([count, threads, shares.ctypes.data], np.int64)
            run(arguments.ctypes.data)
            assert [shares[0, 0], shares[-1, 1]] == [0, count]
            assert (shares[1:, 0] == shares[:-1, 1]).all()
            assert set(shares[:, 1] - shares[:, 0]) <= {count // threads, -(-count // threads)}


@pytest.mark.parametrize(("outputs", "inputs", "width", "group", "dtype"), CASES)
def test_it_is_the_product_for_any_number_of_rows(
    team: Team, outputs: int, inputs: int, width: int, group: int, dtype: torch.dtype
) -> None:
    weight, bias = numbers(outputs, inputs, dtype=dtype), numbers(outputs, dtype=dtype)
    blocked, _memory = pack_by_hand(weight, width, group)
    for layer_bias in (None, bias):
        product = HeadProduct(blocked, layer_bias, team, None)
        for rows in range(1, ROW_COUNTS[-1] + 1):
            x = numbers(rows, inputs, dtype=dtype)
            expected = x.double() @ weight.double().t() + (0 if layer_bias is None else layer_bias.double())
            found = product(x)
            assert found.shape == (rows, outputs) and found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)


def test_a_row_does_not_depend_on_the_others(team: Team) -> None:
    weight, x = numbers(96, 64, dtype=torch.bfloat16), numbers(4, 64, dtype=torch.bfloat16)
    blocked, _memory = pack_by_hand(weight, 32, 2)
    product = HeadProduct(blocked, None, team, None)
    together = product(x).clone()
    for row in range(4):
        assert torch.equal(product(x[row : row + 1])[0], together[row])
        assert torch.equal(product(x[: row + 1])[row], together[row])
    spoilt = x.clone()
    spoilt[1] = float("nan")
    found = product(spoilt)
    assert found[1].isnan().all() and torch.equal(found[0], together[0]) and torch.equal(found[2:], together[2:])
    assert torch.equal(product(x), together)  # nothing of it is left behind


def test_rows_may_be_apart(team: Team) -> None:
    weight = numbers(96, 64, dtype=torch.bfloat16)
    blocked, _memory = pack_by_hand(weight, 32, 2)
    product = HeadProduct(blocked, None, team, None)
    wide = numbers(3, 128, dtype=torch.bfloat16)
    assert torch.equal(product(wide[:, :64]), product(wide[:, :64].contiguous()))


def test_row_counts_are_rounded_up() -> None:
    assert [row_count(rows) for rows in (1, 2, 3, 4)] == [1, 2, 4, 4]


def test_what_there_is_code_for() -> None:
    layout = BlockLayout(32, 2, "bfloat16")
    assert ProductShape(10, 48, 64, layout).is_supported
    assert not ProductShape(10, 40, 64, layout).is_supported
    assert not ProductShape(10, 48, 50, layout).is_supported
    shape = ProductShape.of(BlockedWeight(0, 65, 48, 64, layout))
    assert (shape.num_blocks, shape.padded_out) == (3, 96)


def test_biases_are_as_long_as_whole_blocks() -> None:
    weight = BlockedWeight(0, 65, 48, 64, BlockLayout(32, 2, "bfloat16"))
    padded = padded_bias(weight, torch.ones(65, dtype=torch.bfloat16))
    assert padded.dtype == torch.float32 and padded.tolist() == [1.0] * 65 + [0.0] * 31

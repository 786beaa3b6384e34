"""The pool alone, and against a plain model of it: a list of free blocks and a count for each of the others."""

import sys
import types
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from folovllm.core_proc.block_pool import NULL_BLOCK, BlockPool


def test_every_block_but_the_null_block_is_handed_out_once() -> None:
    pool = BlockPool(5)
    assert pool.num_usable == pool.num_free == 4
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0
    pool.check_invariants([0, 1, 1, 1, 1])


def test_smallest_pool() -> None:
    pool = BlockPool(2)
    assert pool.allocate(1) == [1]
    pool.free([1])
    assert pool.allocate(1) == [1]


@pytest.mark.parametrize("num_blocks", [-1, 0, 1])
def test_a_pool_without_usable_blocks_is_refused(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks={num_blocks}"):
        BlockPool(num_blocks)


def test_blocks_without_a_name_go_first_then_the_one_that_has_been_free_the_longest() -> None:
    pool = BlockPool(7)
    pool.allocate(6)
    for block in (1, 2, 3):
        pool.give_name(block, bytes([block]))
    pool.free([3, 6, 1])
    pool.free([4, 2])
    assert pool.free_block_ids() == [4, 6, 3, 1, 2]
    assert pool.allocate(3) == [4, 6, 3]
    assert (pool.num_evicted, pool.num_cached) == (1, 2)


def test_a_free_block_is_found_by_its_name_until_it_is_handed_out() -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    pool.give_name(1, b"one")
    assert (pool.find(b"one"), pool.find(b"two"), pool.is_free(1)) == (1, None, False)
    pool.free([1])
    assert (pool.find(b"one"), pool.is_free(1)) == (1, True)
    pool.share([1])
    assert pool.find(b"one") == 1
    pool.free([1])
    assert pool.allocate(1) == [1]
    assert pool.find(b"one") is None
    pool.free([1])
    assert (pool.num_cached, pool.num_evicted) == (0, 1)


def test_the_first_name_of_a_block_and_the_first_block_of_a_name_stay() -> None:
    pool = BlockPool(4)
    pool.allocate(3)
    pool.give_name(1, b"one")
    pool.give_name(2, b"one")
    pool.give_name(1, b"other")
    assert (pool.find(b"one"), pool.find(b"other"), pool.num_cached) == (1, None, 1)
    pool.check_invariants()


def test_only_a_block_that_is_held_gets_a_name() -> None:
    with pytest.raises(AssertionError, match="block 1 is free"):
        BlockPool(3).give_name(1, b"one")


def test_all_names_can_be_forgotten() -> None:
    pool = BlockPool(4)
    pool.allocate(3)
    for block in (1, 2):
        pool.give_name(block, bytes([block]))
    pool.free([1])
    pool.forget_all_names()
    assert (pool.find(b"\1"), pool.find(b"\2"), pool.num_cached, pool.num_evicted) == (None, None, 0, 0)
    pool.check_invariants([0, 0, 1, 1])


@pytest.mark.parametrize("num_blocks", [1000, 100_000])
def test_work_does_not_grow_with_the_pool(num_blocks: int) -> None:
    """Counted, not timed: executed lines of Python for the same operations on a small and a large pool."""
    pool = BlockPool(num_blocks)
    lines = 0

    def count(_frame: types.FrameType, event: str, _argument: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        block_ids = pool.allocate(10)
        for block in block_ids:
            pool.give_name(block, b"%d" % block)
        pool.free(block_ids)
        pool.share(block_ids[3:5])
        pool.free(block_ids[3:5])
    finally:
        sys.settrace(before)
    assert 0 < lines < 400


def test_a_shared_block_is_free_when_its_last_holder_gives_it_up() -> None:
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.share([block, block])
    assert pool.is_shared(block)
    assert pool.num_references(block) == 3
    assert pool.num_shares == 2
    pool.free([block])
    pool.free([block])
    assert not pool.is_shared(block)
    assert pool.num_free == 1
    pool.free([block])
    assert pool.num_free == 2
    assert pool.num_shares == 0


def test_a_free_block_can_be_taken_back_out_of_the_middle() -> None:
    pool = BlockPool(5)
    pool.share([2])
    assert pool.free_block_ids() == [1, 3, 4]
    pool.share([4])
    assert pool.free_block_ids() == [1, 3]
    pool.share([1])
    assert pool.allocate(1) == [3]
    assert pool.num_free == 0
    pool.check_invariants([0, 1, 1, 1, 1])


@pytest.mark.parametrize("num_blocks", [-1, 4])
def test_asking_for_more_than_is_free_is_a_fault_of_the_caller(num_blocks: int) -> None:
    with pytest.raises(AssertionError):
        BlockPool(4).allocate(num_blocks)


def test_freeing_twice_and_sharing_the_null_block_are_faults_of_the_caller() -> None:
    pool = BlockPool(4)
    with pytest.raises(AssertionError, match="free already"):
        pool.free([1])
    with pytest.raises(AssertionError, match="null block"):
        pool.share([NULL_BLOCK])


def test_check_names_references_that_no_table_accounts_for() -> None:
    pool = BlockPool(3)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="block tables"):
        pool.check_invariants([0, 0, 0])


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(9)
        self.free = list(range(1, 9))
        self.references = [0] * 9
        self.names: dict[int, bytes] = {}

    @rule(num_blocks=st.integers(0, 8))
    def allocate(self, num_blocks: int) -> None:
        num_blocks = min(num_blocks, len(self.free))
        expected, self.free = self.free[:num_blocks], self.free[num_blocks:]
        assert self.pool.allocate(num_blocks) == expected
        for block in expected:
            self.references[block] = 1
            self.names.pop(block, None)

    @rule(block=st.integers(1, 8))
    def share(self, block: int) -> None:
        self.pool.share([block])
        if block in self.free:
            self.free.remove(block)
        self.references[block] += 1

    @precondition(lambda self: any(self.references))
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        held = [block for block in range(1, 9) if self.references[block]]
        blocks = data.draw(st.lists(st.sampled_from(held), unique=True))
        self.pool.free(blocks)
        for block in blocks:
            self.references[block] -= 1
            if not self.references[block]:
                self.free.insert(len(self.free) if block in self.names else 0, block)

    @precondition(lambda self: any(self.references))
    @rule(data=st.data(), name=st.binary(min_size=1, max_size=1))
    def give_name(self, data: st.DataObject, name: bytes) -> None:
        block = data.draw(st.sampled_from([block for block in range(1, 9) if self.references[block]]))
        self.pool.give_name(block, name)
        if block not in self.names and name not in self.names.values():
            self.names[block] = name

    @rule()
    def forget_all_names(self) -> None:
        self.pool.forget_all_names()
        self.names.clear()

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check_invariants(self.references)
        assert self.pool.free_block_ids() == self.free
        assert self.pool.num_free == len(self.free)
        assert {name: self.pool.find(name) for name in self.names.values()} == {
            name: block for block, name in self.names.items()
        }
        assert self.pool.num_cached == len(self.names)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)

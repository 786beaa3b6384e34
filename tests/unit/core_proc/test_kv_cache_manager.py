"""Block tables: growing, sharing, copy on write; and a state machine that writes through them into a cache."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from folovllm.core_proc.block_pool import BlockPool
from folovllm.core_proc.kv_cache_manager import BlockCopy, KVCacheManager


def manager_of(num_usable: int, block_size: int = 4) -> KVCacheManager:
    return KVCacheManager(BlockPool(num_usable + 1), block_size)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_table_has_as_many_blocks_as_the_tokens_need(num_tokens: int, num_blocks: int) -> None:
    manager = manager_of(5)
    assert manager.num_blocks_for(num_tokens) == num_blocks
    new = manager.allocate("a", num_tokens)
    assert new is not None
    assert list(manager.block_ids("a")) == new
    assert len(new) == num_blocks
    assert manager.num_reserved_tokens == 4 * num_blocks


def test_growing_gives_only_what_is_missing() -> None:
    manager = manager_of(5)
    assert manager.allocate("a", 3) == [1]
    assert manager.allocate("a", 4) == []
    assert manager.allocate("a", 12) == [2, 3]
    assert manager.allocate("a", 1) == []
    assert list(manager.block_ids("a")) == [1, 2, 3]


def test_a_pool_too_small_changes_nothing() -> None:
    manager = manager_of(2)
    manager.allocate("a", 4)
    assert manager.allocate("a", 13) is None
    assert manager.allocate("b", 9) is None
    assert list(manager.block_ids("a")) == [1]
    with pytest.raises(KeyError):
        manager.block_ids("b")
    manager.check_invariants()


def test_append_blocks_serves_all_or_none() -> None:
    manager = manager_of(5)
    manager.allocate("a", 4)
    manager.allocate("b", 4)
    assert manager.append_blocks(["a", "b"]) == [3, 4]
    assert manager.append_blocks(["a", "b"]) is None
    assert list(manager.block_ids("a")) == [1, 3]
    assert manager.append_blocks([]) == []
    manager.check_invariants()


def test_a_fork_takes_no_block_and_the_first_write_copies_the_partly_filled_one() -> None:
    manager = manager_of(6)
    manager.allocate("a", 7)
    manager.fork("a", "b", 6)
    assert manager.pool.num_free == 4
    assert manager.allocate("b", 7) == []
    assert manager.make_writable("b", 6, 7) == [BlockCopy(1, 2, 3)]
    assert list(manager.block_ids("a")) == [1, 2]
    assert list(manager.block_ids("b")) == [1, 3]
    assert manager.make_writable("a", 7, 8) == []
    assert manager.make_writable("b", 6, 8) == []
    manager.check_invariants()


def test_whoever_writes_first_copies_the_parent_too() -> None:
    manager = manager_of(6)
    manager.allocate("a", 7)
    manager.fork("a", "b", 7)
    assert manager.make_writable("a", 7, 8) == [BlockCopy(1, 2, 3)]
    assert manager.make_writable("b", 7, 8) == []
    assert list(manager.block_ids("b")) == [1, 2]


def test_a_fork_at_a_block_border_has_nothing_to_copy() -> None:
    manager = manager_of(6)
    manager.allocate("a", 9)
    manager.fork("a", "b", 8)
    assert manager.allocate("b", 9) == [4]
    assert manager.make_writable("b", 8, 9) == []


def test_copy_on_write_without_a_free_block_changes_nothing() -> None:
    manager = manager_of(2)
    manager.allocate("a", 7)
    manager.fork("a", "b", 7)
    assert manager.make_writable("b", 6, 7) is None
    assert list(manager.block_ids("b")) == [1, 2]
    manager.check_invariants()


def test_the_end_of_a_sequence_is_reused_before_its_beginning() -> None:
    manager = manager_of(3)
    manager.allocate("a", 12)
    manager.name_blocks("a", [b"1", b"2", b"3"], 0, 3)
    manager.free("a")
    assert manager.pool.free_block_ids() == [3, 2, 1]


def test_what_is_cached_is_found_up_to_the_first_gap_and_taken_over_free_or_not() -> None:
    manager = manager_of(4)
    manager.allocate("a", 12)
    manager.name_blocks("a", [b"1", b"2", b"3"], 0, 3)
    assert manager.find_cached([b"1", b"2", b"x", b"3"]) == [1, 2]
    assert manager.find_cached([b"2"]) == [2]
    assert manager.find_cached([]) == []
    manager.take_cached("b", [1, 2])
    manager.free("a")
    assert list(manager.block_ids("b")) == [1, 2]
    assert manager.num_free_without([1, 2]) == 2
    assert manager.num_free_without([1, 3]) == 1
    manager.free("b")
    manager.take_cached("c", manager.find_cached([b"1", b"2", b"3"]))
    assert list(manager.block_ids("c")) == [1, 2, 3]
    manager.check_invariants()


def test_after_a_reset_nothing_is_found_and_holders_keep_their_blocks() -> None:
    manager = manager_of(4)
    manager.allocate("a", 8)
    manager.name_blocks("a", [b"1", b"2"], 0, 2)
    manager.reset_prefix_cache()
    assert manager.find_cached([b"1"]) == []
    assert list(manager.block_ids("a")) == [1, 2]
    manager.check_invariants()


def test_shared_tokens_count_once() -> None:
    manager = manager_of(9)
    manager.allocate("a", 9)
    for key in ("b", "c"):
        manager.fork("a", key, 8)
        manager.allocate(key, 9)
    assert manager.num_held_tokens(27) == 11
    assert manager.num_reserved_tokens == 20
    assert manager.capacity_tokens == 36


def test_forking_onto_a_table_in_use_is_a_fault_of_the_caller() -> None:
    manager = manager_of(4)
    manager.allocate("a", 4)
    manager.allocate("b", 4)
    with pytest.raises(AssertionError, match="'b' has a table"):
        manager.fork("a", "b", 4)


def test_block_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="block_size=0"):
        manager_of(2, 0)


KEYS = st.sampled_from("abcd")


class CacheMachine(RuleBasedStateMachine):
    """Sequences write their tokens through their tables; each must read back its own."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = manager_of(8, 3)
        self.cache: dict[tuple[int, int], int] = {}
        self.tokens: dict[str, list[int]] = {}
        self.num_written = 0

    @rule(key=KEYS, num_tokens=st.integers(1, 7))
    def write(self, key: str, num_tokens: int) -> None:
        old = self.tokens.get(key, [])
        start, end = len(old), len(old) + num_tokens
        before = self.manager.pool.num_free
        if self.manager.allocate(key, end) is None:
            assert before < self.manager.num_blocks_for(end)
            return
        self.tokens[key] = old
        copies = self.manager.make_writable(key, start, end)
        if copies is None:
            return
        for copy in copies:
            for offset in range(3):
                if (copy.source, offset) in self.cache:
                    self.cache[copy.destination, offset] = self.cache[copy.source, offset]
        for position in range(start, end):
            self.num_written += 1
            self.cache[self.manager.block_ids(key)[position // 3], position % 3] = self.num_written
            self.tokens[key].append(self.num_written)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), child=KEYS)
    def fork(self, data: st.DataObject, child: str) -> None:
        parent = data.draw(st.sampled_from(sorted(self.tokens)))
        if child in self.tokens:
            return
        num_tokens = data.draw(st.integers(0, len(self.tokens[parent])))
        free = self.manager.pool.num_free
        self.manager.fork(parent, child, num_tokens)
        self.tokens[child] = self.tokens[parent][:num_tokens]
        assert self.manager.pool.num_free == free

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.tokens)))
        self.manager.free(key)
        del self.tokens[key]

    @invariant()
    def everybody_reads_what_they_wrote(self) -> None:
        self.manager.check_invariants()
        for key, tokens in self.tokens.items():
            table = self.manager.block_ids(key)
            assert [self.cache[table[i // 3], i % 3] for i in range(len(tokens))] == tokens

    def teardown(self) -> None:
        for key in list(self.tokens):
            self.manager.free(key)
        assert self.manager.pool.num_free == self.manager.pool.num_usable


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)

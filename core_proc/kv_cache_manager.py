"""Block tables: which KV blocks hold a sequence's tokens, in order.

Token i of a sequence lies in block `table[i // block_size]` at offset `i % block_size`. Sequences may share blocks
(`fork`). One rule keeps them apart: who writes into a block that others refer to as well first takes a copy of it
(`make_writable`); the caller has the worker carry out the copies before the write.

Full blocks have names (`block_hash`), so that a sequence can take over those that hold its beginning (`find_cached`,
`take_cached`), whether somebody still holds them or they are free.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from folovllm.core_proc.block_hash import BlockHash
from folovllm.core_proc.block_pool import BlockPool


class BlockCopy(NamedTuple):
    """Entry `entry` of a block table changes from `source` to `destination`, after the contents are copied over."""

    entry: int
    source: int
    destination: int


class KVCacheManager:
    """Block tables by key (any hashable name of a sequence) over one pool."""

    def __init__(self, pool: BlockPool, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        self.pool = pool
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._tables: dict[Hashable, list[int]] = {}

    @property
    def capacity_tokens(self) -> int:
        """Tokens the whole pool can hold."""
        return self.pool.num_usable * self.block_size

    @property
    def num_reserved_tokens(self) -> int:
        """Tokens that the blocks in use have room for; a shared block counts once."""
        return (self.pool.num_usable - self.pool.num_free) * self.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def block_ids(self, key: Hashable) -> Sequence[int]:
        return self._tables[key]

    def num_held_tokens(self, num_computed_tokens: int) -> int:
        """Tokens whose K and V are held, each shared one counted once.

        Shared blocks are full: a partly filled one is copied as soon as a second sequence writes into it.

        Args:
            num_computed_tokens: sum over all sequences.
        """
        return num_computed_tokens - self.pool.num_shares * self.block_size

    def allocate(self, key: Hashable, num_tokens: int) -> list[int] | None:
        """Makes the table (a new one where there is none) long enough for `num_tokens` tokens in all.

        Returns:
            The blocks put at its end, or None if the pool has too few; then nothing has changed.
        """
        num_missing = self.num_blocks_for(num_tokens) - len(self._tables.get(key, ()))
        if num_missing > self.pool.num_free:
            return None
        block_ids = self.pool.allocate(max(num_missing, 0))
        self._tables.setdefault(key, []).extend(block_ids)
        return block_ids

    def append_blocks(self, keys: Sequence[Hashable]) -> list[int] | None:
        """One more block for each table; None, and nothing has changed, if the pool has too few."""
        if len(keys) > self.pool.num_free:
            return None
        block_ids = self.pool.allocate(len(keys))
        for key, block in zip(keys, block_ids, strict=True):
            self._tables[key].append(block)
        return block_ids

    def find_cached(self, chain: Sequence[BlockHash]) -> list[int]:
        """The blocks that hold the longest known beginning of a sequence whose full blocks have these names."""
        block_ids: list[int] = []
        for name in chain:
            block = self.pool.find(name)
            if block is None:
                break
            block_ids.append(block)
        return block_ids

    def num_free_without(self, block_ids: Sequence[int]) -> int:
        """Free blocks that are left once `block_ids` are taken over."""
        return self.pool.num_free - sum(map(self.pool.is_free, block_ids))

    def take_cached(self, key: Hashable, block_ids: Sequence[int]) -> None:
        """Makes a table that begins with these blocks, as `find_cached` has just found them."""
        assert key not in self._tables, f"{key!r} has a table already"
        self.pool.share(block_ids)
        self._tables[key] = list(block_ids)

    def name_blocks(self, key: Hashable, chain: Sequence[BlockHash], start: int, end: int) -> None:
        """Entries [start, end) of the table are full and computed: from now on they can be found by their names."""
        table = self._tables[key]
        for entry in range(start, end):
            self.pool.give_name(table[entry], chain[entry])

    def reset_prefix_cache(self) -> None:
        """Nothing that was computed so far is found any more; those who hold blocks keep them."""
        self.pool.forget_all_names()

    def fork(self, parent: Hashable, child: Hashable, num_tokens: int) -> None:
        """Makes a table for `child` that shares the parent's blocks of the first `num_tokens` tokens."""
        assert child not in self._tables, f"{child!r} has a table already"
        shared = self._tables[parent][: self.num_blocks_for(num_tokens)]
        self.pool.share(shared)
        self._tables[child] = shared

    def make_writable(self, key: Hashable, start: int, end: int) -> list[BlockCopy] | None:
        """Copy on write: gives the table a block of its own wherever tokens [start, end) lie in a shared one.

        Returns:
            The copies the worker must make before it writes, or None if the pool has too few; then nothing has changed.
        """
        table = self._tables[key]
        first, last = start // self.block_size, self.num_blocks_for(end)
        shared = [index for index in range(first, last) if self.pool.is_shared(table[index])]
        if len(shared) > self.pool.num_free:
            return None
        copies = [
            BlockCopy(index, table[index], new)
            for index, new in zip(shared, self.pool.allocate(len(shared)), strict=True)
        ]
        for copy in copies:
            table[copy.entry] = copy.destination
        self.pool.free(copy.source for copy in copies)
        return copies

    def free(self, key: Hashable) -> None:
        """Drops the table. Its last blocks come to be reused first: a sequence's beginning is what others share.

        Nor could the rest be found without it: names are looked up from the beginning on.
        """
        self.pool.free(reversed(self._tables.pop(key)))

    def check_invariants(self) -> None:
        """Each block has as many references as there are tables that name it; no table names one twice.

        Raises:
            AssertionError: one of these does not hold.
        """
        expected = [0] * (self.pool.num_usable + 1)
        for key, table in self._tables.items():
            assert len(set(table)) == len(table), f"the table of {key!r} names a block twice"
            for block in table:
                expected[block] += 1
        self.pool.check_invariants(expected)

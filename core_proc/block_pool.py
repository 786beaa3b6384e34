"""The pool of KV blocks: which are free, how many hold each of the others, and what can be found in them.

Idea: a block is free if and only if nobody refers to it. The free blocks form a doubly linked list, threaded through
two arrays of block ids; handing out takes the first. A block whose contents have a name (see `block_hash`) can be found
by it as long as nothing else is written to it, also while it is free: so it goes to the end of the list when it becomes
free, and loses its name no sooner than it is handed out. That is eviction in LRU order, and it costs nothing before. A
block without a name is of no use to anybody and goes to the front.

So everything costs O(1) for each block, also taking a free block out of the middle when somebody refers to its old
contents again. Block 0, the null block, is never handed out (the worker points padding at it), which makes it the
list's anchor.
"""

from collections.abc import Iterable, Sequence

from folovllm.core_proc.block_hash import BlockHash

NULL_BLOCK = 0


class BlockPool:
    """Blocks 1 … num_blocks - 1; block 0 is the null block."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks={num_blocks}: a pool needs the null block and at least one more")
        self.num_usable = num_blocks - 1
        self.num_free = self.num_usable
        self.num_shares = 0  # references beyond each block's first
        self.num_evicted = 0  # named blocks handed out to somebody else, since start
        self._name_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, int] = {}
        self._references = [0] * num_blocks
        self._next = [*range(1, num_blocks), NULL_BLOCK]
        self._previous = [num_blocks - 1, *range(num_blocks - 1)]

    @property
    def num_cached(self) -> int:
        """Blocks, free or not, whose contents can be found."""
        return len(self._block_of)

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes the first free blocks; each gets one reference and loses its name. There must be enough."""
        assert 0 <= num_blocks <= self.num_free, f"{num_blocks} blocks asked for, {self.num_free} free"
        block_ids: list[int] = []
        block = self._next[NULL_BLOCK]
        for _ in range(num_blocks):
            block_ids.append(block)
            self._references[block] = 1
            if self._name_of[block] is not None:
                self._forget(block)
                self.num_evicted += 1
            block = self._next[block]
        self._next[NULL_BLOCK] = block
        self._previous[block] = NULL_BLOCK
        self.num_free -= num_blocks
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """One more reference to each block. A free one leaves the free list with its contents untouched."""
        for block in block_ids:
            assert block != NULL_BLOCK, "the null block has no owner"
            if self._references[block]:
                self.num_shares += 1
            else:
                self._unlink(block)
                self.num_free -= 1
            self._references[block] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """One reference less to each block; those without any become free.

        Of those with a name the first will be reused first; those without will be reused before all others.
        """
        for block in block_ids:
            assert self._references[block] > 0, f"block {block} is free already"
            self._references[block] -= 1
            if self._references[block]:
                self.num_shares -= 1
            else:
                self._link_after(NULL_BLOCK if self._name_of[block] is None else self._previous[NULL_BLOCK], block)
                self.num_free += 1

    def find(self, name: BlockHash) -> int | None:
        """The block that holds what `name` stands for, None if there is none."""
        return self._block_of.get(name)

    def is_free(self, block: int) -> bool:
        return self._references[block] == 0

    def give_name(self, block: int, name: BlockHash) -> None:
        """What is in the block, which somebody must hold, can be found by `name` from now on.

        Where another block holds the same already, that one stays the one to be found. A block keeps its first name.
        """
        assert self._references[block] > 0, f"block {block} is free and gets a name"
        if self._name_of[block] is None and name not in self._block_of:
            self._name_of[block] = name
            self._block_of[name] = block

    def forget_all_names(self) -> None:
        """Nothing can be found any more."""
        for block in list(self._block_of.values()):
            self._forget(block)

    def is_cached(self, block: int) -> bool:
        """Whether its contents can be found."""
        return self._name_of[block] is not None

    def num_references(self, block: int) -> int:
        return self._references[block]

    def is_shared(self, block: int) -> bool:
        return self._references[block] > 1

    def free_block_ids(self) -> list[int]:
        """The free blocks in the order in which they will be handed out. O(num_blocks); for checks."""
        block_ids: list[int] = []
        block = self._next[NULL_BLOCK]
        while block != NULL_BLOCK and len(block_ids) <= self.num_usable:
            block_ids.append(block)
            block = self._next[block]
        return block_ids

    def check_invariants(self, expected_references: Sequence[int] | None = None) -> None:
        """Every block is free xor referenced, each is in the free list at most once, counts add up.

        Args:
            expected_references: how many references each block should have, where the caller knows.

        Raises:
            AssertionError: one of these does not hold.
        """
        free = self.free_block_ids()
        assert len(free) == len(set(free)) == self.num_free, "the free list is broken"
        assert self._references[NULL_BLOCK] == 0, "the null block is referenced"
        unreferenced = {block for block in range(1, self.num_usable + 1) if self._references[block] == 0}
        assert set(free) == unreferenced, "a block is both free and referenced, or neither"
        assert self.num_shares == sum(count - 1 for count in self._references if count > 1), "num_shares is wrong"
        named = {block: name for block, name in enumerate(self._name_of) if name is not None}
        assert named == {block: name for name, block in self._block_of.items()}, "names and blocks differ"
        assert NULL_BLOCK not in named, "the null block has a name"
        if expected_references is not None:
            assert self._references == list(expected_references), "references do not match the block tables"

    def _unlink(self, block: int) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before] = after
        self._previous[after] = before

    def _link_after(self, before: int, block: int) -> None:
        after = self._next[before]
        self._next[before] = block
        self._previous[block] = before
        self._next[block] = after
        self._previous[after] = block

    def _forget(self, block: int) -> None:
        name = self._name_of[block]
        assert name is not None, f"block {block} has no name"
        del self._block_of[name]
        self._name_of[block] = None

"""Names of blocks: equal exactly where everything up to the block's end is equal."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.core_proc.block_hash import BlockHash, extend_chain, root_hash

TOKENS = st.lists(st.integers(0, 2), max_size=24)


def chain_of(tokens: list[int], block_size: int = 4, salt: str = "") -> list[BlockHash]:
    chain: list[BlockHash] = []
    extend_chain(chain, root_hash(salt), np.array(tokens, "<i4").tobytes(), 4 * block_size)
    return chain


def test_only_full_blocks_have_names() -> None:
    assert [len(chain_of([1] * count)) for count in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TOKENS, TOKENS, st.integers(1, 5))
def test_names_agree_exactly_as_far_as_the_tokens_do(one: list[int], other: list[int], block_size: int) -> None:
    pairs = zip(chain_of(one, block_size), chain_of(other, block_size), strict=False)
    for index, (name, other_name) in enumerate(pairs):
        end = (index + 1) * block_size
        assert (name == other_name) == (one[:end] == other[:end])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(TOKENS, st.integers(0, 6))
def test_a_chain_made_in_two_parts_is_the_same(tokens: list[int], num_blocks: int) -> None:
    block_size = 3
    cut = min(num_blocks, len(tokens) // block_size) * block_size
    chain = chain_of(tokens[:cut], block_size)
    extend_chain(chain, root_hash(""), np.array(tokens[cut:], "<i4").tobytes(), 4 * block_size)
    assert chain == chain_of(tokens, block_size)


def test_no_name_occurs_twice_in_a_chain_of_equal_blocks() -> None:
    chain = chain_of([7] * 400)
    assert len(set(chain)) == len(chain) == 100


def test_salts_have_no_name_in_common() -> None:
    tokens = [5] * 40
    assert not set(chain_of(tokens)) & set(chain_of(tokens, salt="tenant"))
    assert chain_of(tokens, salt="tenant") == chain_of(tokens, salt="tenant")
    assert root_hash("a") != root_hash("b")


def test_token_ids_of_any_size_count_whole() -> None:
    assert chain_of([1, 0, 0, 0]) != chain_of([256, 0, 0, 0]) != chain_of([2**31 - 1, 0, 0, 0])

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm.common.errors import ProtocolError
from folovllm.frontend import int32


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50))
def test_round_trip(values: list[int]) -> None:
    data = int32.pack(values)
    assert len(data) == 4 * len(values)
    assert int32.unpack(data) == values


def test_the_bytes_are_little_endian() -> None:
    assert int32.pack([1, -1]) == b"\x01\x00\x00\x00\xff\xff\xff\xff"


def test_what_does_not_fit_is_no_silent_overflow() -> None:
    with pytest.raises(Exception, match="format requires"):
        int32.pack([2**31])


def test_bytes_that_are_no_whole_number_of_entries() -> None:
    with pytest.raises(ProtocolError, match="5 bytes are no whole number of int32"):
        int32.unpack(b"12345")

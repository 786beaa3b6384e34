"""Byte fields as arrays, and what is said of those that do not fit."""

import numpy as np
import pytest

from folovllm.common.errors import ProtocolError
from folovllm.worker_proc.wire_fields import check, check_each, check_range, ints


def test_int32_bytes_become_int64() -> None:
    values = ints(np.array([1, -2, 2**31 - 1], "<i4").tobytes(), "field")
    assert values.dtype == np.int64
    assert values.tolist() == [1, -2, 2**31 - 1]
    assert ints(b"", "field").tolist() == []


def test_a_part_of_a_number_is_refused_by_name() -> None:
    with pytest.raises(ProtocolError, match="field: 5 bytes are no whole number of int32"):
        ints(b"abcde", "field")


@pytest.mark.parametrize(("values", "wrong"), [([0, 3], None), ([], None), ([1, -1], -1), ([2, 4, 9], 4)])
def test_ranges_name_the_first_at_fault(values: list[int], wrong: int | None) -> None:
    array = np.array(values, np.int64)
    if wrong is None:
        check_range(array, 0, 4, "field")
        return
    with pytest.raises(ProtocolError, match=f"field: {wrong} is out of range; it must be 0 to 3"):
        check_range(array, 0, 4, "field")


def test_checks_say_what_they_are_told() -> None:
    check(True, "fine")
    check_each(np.array([3, 4]), np.array([True, True]), "is wrong")
    with pytest.raises(ProtocolError, match="slot 4 is wrong"):
        check_each(np.array([3, 4]), np.array([True, False]), "is wrong")
    with pytest.raises(ProtocolError, match="not fine"):
        check(False, "not fine")

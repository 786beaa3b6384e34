import sys

import pytest

from folovllm.common.errors import ConfigError
from folovllm.frontend.calibration_text import builtin_text, name_of_builtin, samples


def test_the_builtin_text_is_long_english_in_two_parts() -> None:
    text, held_back = builtin_text()
    assert len(text) > 300_000 and len(held_back) > 40_000
    assert held_back[:2000] not in text
    assert text.count(" the ") > 3000
    assert len(name_of_builtin(held_back)) < 100 and name_of_builtin(text) != name_of_builtin(held_back)


def test_a_python_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ConfigError, match="give --calibration FILE"):
        builtin_text()


@pytest.mark.parametrize(
    ("length", "most", "expected"),
    [
        (4, 2, [[0, 1, 2, 3], [6, 7, 8, 9]]),
        (4, 1, [[0, 1, 2, 3]]),
        (3, 9, [[0, 1, 2], [3, 4, 5], [7, 8, 9]]),
        (10, 9, [list(range(10))]),
    ],
)
def test_samples_are_spread_over_the_text(length: int, most: int, expected: list[list[int]]) -> None:
    assert samples(range(10), length, most) == expected


def test_too_short_a_text() -> None:
    with pytest.raises(ConfigError, match="3 tokens, fewer than one sample of 4"):
        samples([1, 2, 3], 4, 1)

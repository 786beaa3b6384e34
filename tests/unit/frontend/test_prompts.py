"""Each form of a prompt; what `InputProcessor` makes of them, errors included, is tested with it."""

from typing import Any

import pytest

from folovllm.common.errors import RequestError
from folovllm.frontend.prompts import RenderedChat, as_list, checked_ids, unwrapped


@pytest.mark.parametrize(
    "given, many",
    [
        ("ab", False),
        ([1, 2], False),
        (range(3), False),
        ({"prompt": "ab"}, False),
        (RenderedChat("ab"), False),
        (["ab"], True),
        ([[1], [2]], True),
        (({"prompt": "a"}, "b"), True),
        ([RenderedChat("ab")], True),
    ],
)
def test_one_prompt_or_many(given: Any, many: bool) -> None:
    assert as_list(given) == (many, given if many else [given])


@pytest.mark.parametrize("given", [[], (), None, 5, b"ab"])
def test_what_is_neither_is_refused(given: Any) -> None:
    with pytest.raises(RequestError) as caught:
        as_list(given)
    assert caught.value.field == "prompts"


@pytest.mark.parametrize(
    "given, value, salt",
    [
        ("ab", "ab", ""),
        ([1], [1], ""),
        ({"prompt": "ab"}, "ab", ""),
        ({"prompt": "ab", "cache_salt": None}, "ab", ""),
        ({"prompt_token_ids": (1,), "cache_salt": "a b"}, (1,), "a b"),
        (RenderedChat("ab"), "ab", ""),
        (RenderedChat("ab", "é"), "ab", "é"),
    ],
)
def test_text_or_ids_and_salt(given: Any, value: Any, salt: str) -> None:
    assert unwrapped(given) == (value, salt)


@pytest.mark.parametrize("salt", ["", 5, "x" * 257, "a\nb", "\ud800"])
def test_a_salt_that_is_none_is_refused(salt: Any) -> None:
    for prompt in ({"prompt_token_ids": [1], "cache_salt": salt}, RenderedChat("a", salt)):
        with pytest.raises(RequestError, match="cache_salt must be a string of 1 to 256 printable") as caught:
            unwrapped(prompt)
        assert caught.value.field == "cache_salt"


def test_ids_are_copied_and_bounded() -> None:
    ids = [0, 9]
    checked = checked_ids(ids, 10)
    assert checked == ids
    assert checked is not ids
    for wrong in ([10], [-1], [True], [1.0], [], "ab", b"ab", 5):
        with pytest.raises(RequestError) as caught:
            checked_ids(wrong, 10)
        assert caught.value.field == "prompt_token_ids"

"""The page on the project's structure: it names every module of the four rooms once, and none that is not there."""

import collections
import re

import pytest

from tests.sources import ROOMS, ROOT

_SECTION = re.compile(r"^### (\w+)$", re.MULTILINE)
_MODULE_CELL = re.compile(r"^\| (`[^|]*`) \|", re.MULTILINE)
_NAME = re.compile(r"`([^`]+)`")
_FEWEST_MODULES = 40


def _named(page: str) -> dict[str, list[str]]:
    """Room → the modules that the first column of its table names, as often as it does."""
    parts = _SECTION.split(page)
    rooms = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {
        room: [name for cell in _MODULE_CELL.findall(text) for name in _NAME.findall(cell)]
        for room, text in rooms.items()
    }


def _modules(room: str) -> list[str]:
    paths = [path.relative_to(ROOT / room) for path in (ROOT / room).rglob("*.py")]
    return sorted(path.with_suffix("").as_posix() for path in paths if path.name != "__init__.py")


def _page() -> dict[str, list[str]]:
    return _named((ROOT / "docs" / "project_structure.md").read_text(encoding="utf-8"))


def test_names_are_read_from_the_first_column_only() -> None:
    page = (
        "# x\n`no`\n### common\n\n| module | for |\n|---|---|\n| `a` `b/c` | not `d` |\n\n### frontend\n\n| `a` | x |\n"
    )
    assert _named(page) == {"common": ["a", "b/c"], "frontend": ["a"]}


def test_the_page_has_the_four_rooms() -> None:
    assert sorted(_page()) == sorted(ROOMS)
    assert sum(len(_modules(room)) for room in ROOMS) > _FEWEST_MODULES


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_is_named_once_and_exists(room: str) -> None:
    named, there = collections.Counter(_page()[room]), set(_modules(room))
    assert {"not on the page": there - set(named), "not there": set(named) - there} == {
        "not on the page": set(),
        "not there": set(),
    }
    assert [name for name, count in named.items() if count > 1] == []

"""The Markdown pages: their links lead somewhere, and the life of a request names functions that exist."""

import importlib
import pathlib
import re

import pytest

from tests.sources import ROOT

_STOP = re.compile(r"^\s*(?:-|\d+\.)\s+`([a-z_]+(?:/[a-z_0-9]+)+)\.py:([A-Za-z_0-9.]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_CODE_SPAN = re.compile(r"`[^`\n]*`")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)
_NOT_IN_AN_ANCHOR = re.compile(r"[^\w\- ]")


def _pages() -> list[pathlib.Path]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
    assert len(pages) > 1
    return pages


def _anchors(page: pathlib.Path) -> set[str]:
    headings = _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    return {_NOT_IN_AN_ANCHOR.sub("", heading.lower()).replace(" ", "-") for heading in headings}


def _broken_links(page: pathlib.Path) -> list[str]:
    text = _CODE_SPAN.sub("", _FENCE.sub("", page.read_text(encoding="utf-8")))
    broken = []
    for link in _LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue  # other hosts cannot be asked in a test
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in _anchors(target)):
            broken.append(link)
    return broken


def _stops() -> list[tuple[str, str]]:
    lines = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()
    return [(match[1], match[2]) for line in lines if (match := _STOP.match(line))]


def test_link_check_finds_what_is_broken(tmp_path: pathlib.Path) -> None:
    (tmp_path / "other.md").write_text("# One heading, `with` code\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#one-heading-with-code) [c](https://example.org/x) `[no](link)`\n"
        "```\n[no](link)\n```\n[d](gone.md) ![e](other.md#two) [f](#three)\n## Three\n"
    )
    assert _broken_links(page) == ["gone.md", "other.md#two"]


@pytest.mark.parametrize("page", _pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    assert not _broken_links(page)


def test_the_life_of_a_request_has_few_stops_and_each_exists() -> None:
    stops = _stops()
    assert 8 < len(stops) <= 16
    for module, qualname in stops:
        target: object = importlib.import_module("folovllm." + module.replace("/", "."))
        for part in qualname.split("."):
            target = getattr(target, part)
        assert callable(target), f"{module}.py:{qualname}"

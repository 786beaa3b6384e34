"""The site's hook: links to files outside of docs/ become text, the others stay, a target that is gone is told."""

import logging
import pathlib

import pytest

from docs.site_hooks import without_outward_links
from tests.sources import ROOT


@pytest.fixture
def docs(tmp_path: pathlib.Path) -> pathlib.Path:
    """A docs/ beside a source file."""
    (tmp_path / "code.py").touch()
    (tmp_path / "docs" / "learn").mkdir(parents=True)
    return tmp_path / "docs"


_STAYS = "[a](learn/x.md#y) [b](https://example.org/../x) [c](#d) [d](./learn/../x.md) ![a picture](../code.py)"
_FENCE = "```\n[a](../code.py)\n```\n"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("see [`code.py`](../code.py), here", "see `code.py`, here"),
        ("[a](../code.py#L3) [b](other.md)", "a [b](other.md)"),
        (_STAYS, _STAYS),
        (f"{_FENCE}[a](../code.py)\n{_FENCE}", f"{_FENCE}a\n{_FENCE}"),
    ],
)
def test_only_links_that_leave_the_folder_become_text(
    docs: pathlib.Path, caplog: pytest.LogCaptureFixture, text: str, shown: str
) -> None:
    assert without_outward_links(text, docs / "page.md", docs) == shown
    assert not caplog.records


def test_a_page_in_a_folder(docs: pathlib.Path) -> None:
    text = "[a](../../code.py) [b](../page.md)"
    assert without_outward_links(text, docs / "learn" / "page.md", docs) == "a [b](../page.md)"


def test_a_target_that_is_gone_is_a_warning(docs: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under MkDocs' own logger, whose warnings fail a strict build."""
    assert without_outward_links("[a](../gone.py)", docs / "page.md", docs) == "a"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.name.startswith("mkdocs.")
    assert "../gone.py, which does not exist" in record.message


def test_every_check_builds_the_site() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "mkdocs build --strict" in makefile
    for target in ("lint", "docs"):
        recipe = makefile.partition(f"\n{target}: ")[2].partition("\n\n")[0]
        assert "$(SITE)" in recipe

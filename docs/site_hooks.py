"""A hook of MkDocs: links that leave docs/, to a source file, become its name.

On a code host such a link opens the file; the site does not hold it. A target that does not exist is a warning, so the
strict build fails.
"""

import logging
import pathlib
import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\.?/[^)#\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)

logger = logging.getLogger("mkdocs.hooks.docs")


def without_outward_links(text: str, page: pathlib.Path, docs: pathlib.Path) -> str:
    """The page's text; `page` and `docs` are paths of the file and of the documentation's folder."""

    def shown(match: re.Match[str]) -> str:
        target = (page.parent / match[2]).resolve()
        if target.is_relative_to(docs):
            return match[0]
        if not target.exists():
            logger.warning("%s links to %s, which does not exist", page, match[2])
        return match[1]

    parts, place = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(shown, text[place : fence.start()]), fence[0]]
        place = fence.end()
    return "".join([*parts, _LINK.sub(shown, text[place:])])


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """What MkDocs calls with every page."""
    docs = pathlib.Path(config["docs_dir"]).resolve()
    return without_outward_links(markdown, pathlib.Path(page.file.abs_src_path).resolve(), docs)

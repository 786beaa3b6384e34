"""The page's files: what a browser asks for, and what it gets. They are the same for everybody."""

from collections.abc import Mapping
from pathlib import Path

_FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_NAMES = (
    *("index.html", "style.css", "icon.svg"),
    *("main.js", "api.js", "chat.js", "conversations.js", "dom.js", "inspector.js", "drawing.js", "markdown.js"),
)

PAGE_PATHS: Mapping[str, str] = {"/": "index.html", **{f"/page/{name}": name for name in _NAMES[1:]}}


def read_page_file(name: str) -> tuple[bytes, str]:
    """A file's contents and its media type."""
    path = _FOLDER / name
    return path.read_bytes(), f"{_TYPES[path.suffix]}; charset=utf-8"

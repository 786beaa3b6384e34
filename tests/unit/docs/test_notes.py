"""The notes and pages: every function they name exists, and each note has all its parts."""

import ast
import pathlib
import re

import pytest

from tests.sources import ROOMS, ROOT

_NAMED = re.compile(rf"`((?:{'|'.join(ROOMS)}|bench)/[a-z_0-9/]+)\.py(?::([A-Za-z_0-9.]+))?`")
_FIGURE = re.compile(r"!\[([^\]]*)\]\(")
_QUESTION = re.compile(r"^\*\*\d+\. .*\*\*$", re.MULTILINE)
_SECTIONS = (
    "## Why it exists",
    "## Principle",
    "## Our code",
    "## vLLM compared",
    "## What we simplified, and what it costs",
    "## Interview questions",
    "## References",
)

NOTES = sorted((ROOT / "docs" / "learn").glob("[0-9]*.md"))
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def _names(tree: ast.Module) -> set[str]:
    """Qualified names of all functions, classes, methods and of what is assigned at the top of a module or class."""
    found: set[str] = set()

    def walk(parent: ast.AST, prefix: str) -> None:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                walk(node, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)
            elif isinstance(node, ast.Assign):
                found.update(prefix + target.id for target in node.targets if isinstance(target, ast.Name))

    walk(tree, "")
    return found


def _missing(text: str) -> list[str]:
    """What `text` names and the code does not have."""
    missing = []
    for path, qualname in _NAMED.findall(text):
        file = ROOT / f"{path}.py"
        if not file.is_file() or (qualname and qualname not in _names(ast.parse(file.read_text(encoding="utf-8")))):
            missing.append(f"{path}.py:{qualname}")
    return missing


def test_a_name_that_does_not_exist_is_found() -> None:
    text = (
        "`common/config.py:EngineConfig` `common/config.py:EngineConfig.block_size` `common/config.py`\n"
        "`common/config.py:NoSuchThing` `common/no_such_file.py:f` `vllm/v1/core/block_pool.py:BlockPool`\n"
    )
    assert _missing(text) == ["common/config.py:NoSuchThing", "common/no_such_file.py:f"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_function_named_exists(page: pathlib.Path) -> None:
    assert _missing(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_figures_say_what_they_show(page: pathlib.Path) -> None:
    assert all(len(text) > 10 for text in _FIGURE.findall(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("note", NOTES, ids=lambda note: note.name)
def test_a_note_has_all_its_parts(note: pathlib.Path) -> None:
    text = note.read_text(encoding="utf-8")
    positions = [text.find(f"\n{section}\n") for section in _SECTIONS]
    assert -1 not in positions, [s for s, at in zip(_SECTIONS, positions, strict=True) if at < 0]
    assert positions == sorted(positions)
    questions = text[positions[5] : positions[6]]
    assert len(_QUESTION.findall(questions)) >= 8
    assert questions.count("*Follow-up:") >= 8


def test_notes_are_numbered_and_listed() -> None:
    numbers = [note.name[:2] for note in NOTES]
    assert numbers[:3] == ["01", "02", "03"]
    assert numbers == sorted(set(numbers))
    listed = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [note.name for note in NOTES if f"(learn/{note.name})" not in listed] == []

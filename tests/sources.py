"""The one place from which tests get the project's source files, so that no house rule is checked against nothing."""

import ast
import io
import pathlib
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ("common", "core_proc", "worker_proc", "frontend")
FEWEST_FILES = 40

_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}

AnyFunction = ast.FunctionDef | ast.AsyncFunctionDef


class Function(NamedTuple):
    """A function or method: `name` is `room/module.py:Class.method`, `code_lines` the number of its lines with code."""

    name: str
    node: AnyFunction
    code_lines: int


class SourceFile:
    """One parsed file. `name` is its path from the root; `code_lines` leaves out blanks, comments and docstrings."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self.tree = ast.parse(text, name)
        self.code_lines = _lines_with_tokens(text) - _docstring_lines(self.tree)

    def functions(self) -> list[Function]:
        """All functions and methods, nested ones too; the lines of a nested one count for the outer one as well."""
        return [self._function(qualname, node) for qualname, node in _walk_functions(self.tree, "")]

    def _function(self, qualname: str, node: AnyFunction) -> Function:
        assert node.end_lineno is not None, "ast.parse sets it on every function"
        lines = self.code_lines & set(range(node.lineno, node.end_lineno + 1))
        return Function(f"{self.name}:{qualname}", node, len(lines))


def source_files() -> list[SourceFile]:
    """Every source file of the four rooms. Fails where it finds too few: a rule that sees no file would always pass."""
    files = [load(path) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(files) > FEWEST_FILES, f"found only {len(files)} source files under {ROOT}"
    return files


def load(path: pathlib.Path) -> SourceFile:
    return SourceFile(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


def _lines_with_tokens(text: str) -> set[int]:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def _docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert node.end_lineno is not None, "ast.parse sets it on every expression"
            lines.update(range(node.lineno, node.end_lineno + 1))
    return lines


def _walk_functions(parent: ast.AST, prefix: str) -> Iterator[tuple[str, AnyFunction]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            qualname = prefix + node.name
            if not isinstance(node, ast.ClassDef):
                yield qualname, node
            yield from _walk_functions(node, qualname + ".")
        else:
            yield from _walk_functions(node, prefix)

"""The house rules as functions: each takes one source file and returns its violations as `file:line: what` strings."""

import ast
import re
from collections.abc import Iterator, Sequence

from tests.sources import SourceFile

_PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal"}
_UNPICKLING_CALLS = {"torch.load", "numpy.load", "np.load", "joblib.load"}
_ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"}
_MUTABLE_DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
_MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "deque", "defaultdict", "Counter", "OrderedDict", "local"}
_MUTATORS = {
    *("add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft", "remove"),
    *("reverse", "setdefault", "sort", "update"),
}
_CONSTANT = re.compile(r"_{0,2}[A-Z][A-Z0-9_]*|__all__")


def no_global(file: SourceFile) -> list[str]:
    return [_at(file, node, "global") for node in ast.walk(file.tree) if isinstance(node, ast.Global)]


def no_mutable_module_state(file: SourceFile) -> list[str]:
    """A module-level container must be a constant by name or by `Final`, and no code of the module may change it."""
    containers = dict(_module_containers(file.tree))
    unmarked = [
        _at(file, node, f"module state {name}")
        for name, node in containers.items()
        if not _CONSTANT.fullmatch(name) and not _is_final(node)
    ]
    return unmarked + [_at(file, node, f"changes module constant {name}") for name, node in _changes(file, containers)]


def environment_only_in_config(file: SourceFile) -> list[str]:
    if file.name == "common/config.py":
        return []
    reads = [_at(file, node, dotted) for node, dotted in _dotted_names(file.tree) if dotted in _ENVIRONMENT]
    return reads + [_at(file, node, name) for node, name in _imports(file.tree) if name in _ENVIRONMENT]


def no_pickle(file: SourceFile) -> list[str]:
    imports = [
        _at(file, node, f"import {name}") for node, name in _imports(file.tree) if name.split(".")[0] in _PICKLES
    ]
    return imports + [
        _at(file, node, dotted) for node, dotted in _dotted_names(file.tree) if dotted in _UNPICKLING_CALLS
    ]


def no_feature_probing(file: SourceFile) -> list[str]:
    probes = []
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "hasattr":
                probes.append(_at(file, node, "hasattr"))
            if node.func.id == "getattr" and len(node.args) > 2:
                probes.append(_at(file, node, "getattr with a default"))
    return probes


def no_mixin(file: SourceFile) -> list[str]:
    classes = [node for node in ast.walk(file.tree) if isinstance(node, ast.ClassDef)]
    return [_at(file, node, node.name) for node in classes if node.name.lower().endswith("mixin")]


def forbidden_imports(file: SourceFile, forbidden: Sequence[str]) -> list[str]:
    """Imports of the modules in `forbidden` or below them, anywhere in the file."""
    return [_at(file, node, name) for node, name in _imports(file.tree) if name.split(".")[0] in forbidden]


def _at(file: SourceFile, node: ast.AST, what: str) -> str:
    return f"{file.name}:{node.lineno}: {what}"  # type: ignore[attr-defined]


def _imports(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Every imported name in full: `from os import environ` gives `os.environ`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def _dotted_names(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node, f"{node.value.id}.{node.attr}"


def _module_containers(tree: ast.Module) -> Iterator[tuple[str, ast.Assign | ast.AnnAssign]]:
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _is_mutable(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((target.id, node) for target in targets if isinstance(target, ast.Name))


def _is_mutable(value: ast.expr) -> bool:
    match value:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name in _MUTABLE_CALLS
    return isinstance(value, _MUTABLE_DISPLAYS)


def _is_final(node: ast.Assign | ast.AnnAssign) -> bool:
    return isinstance(node, ast.AnnAssign) and "Final" in ast.dump(node.annotation)


def _changes(file: SourceFile, names: dict[str, ast.Assign | ast.AnnAssign]) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(file.tree):
        name = _changed_name(node)
        if name in names:
            yield name, node


def _changed_name(node: ast.AST) -> str:
    """The plain name whose container this node changes, or an empty string."""
    match node:
        case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
            return name
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)) if method in _MUTATORS:
            return name
        case ast.AugAssign(target=ast.Name(id=name)):
            return name
    return ""

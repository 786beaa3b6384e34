"""The import package: its four links, what it offers, and what it says where the links were lost."""

import ast
import pathlib
import shutil
import subprocess
import sys
import typing
import zipfile

import pytest

import folovllm
from tests.sources import ROOMS, ROOT, source_files


def _import_error_of(folder: pathlib.Path) -> str:
    """What `import folovllm` prints in `folder`; fails where the import works."""
    done = subprocess.run(
        [sys.executable, "-c", "import folovllm"], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, "the import should have failed"
    return done.stderr


@pytest.fixture
def copied_face(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with a package `folovllm` whose rooms are empty folders."""
    package = tmp_path / "folovllm"
    package.mkdir()
    shutil.copy(ROOT / "folovllm" / "__init__.py", package)
    for room in ROOMS:
        (package / room).mkdir()
    return tmp_path


@pytest.mark.parametrize("room", ROOMS)
def test_a_link_that_arrived_as_a_text_file_is_named(copied_face: pathlib.Path, room: str) -> None:
    place = copied_face / "folovllm" / room
    place.rmdir()
    place.write_text(f"../{room}")
    message = _import_error_of(copied_face)
    assert "ImportError" in message
    assert f"{place} arrived as a text file instead of a symbolic link to ../{room}" in message
    assert "core.symlinks" in message


def test_a_room_that_is_missing_is_named(copied_face: pathlib.Path) -> None:
    place = copied_face / "folovllm" / "worker_proc"
    place.rmdir()
    assert f"{place} is missing" in _import_error_of(copied_face)


def test_the_rooms_are_tracked_relative_links() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    done = subprocess.run(
        ["git", "ls-files", "-s", "folovllm"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    links = {line.split("\t")[1] for line in done.stdout.splitlines() if line.startswith("120000 ")}
    assert links == {f"folovllm/{room}" for room in ROOMS}
    assert {(ROOT / link).readlink().as_posix() for link in links} == {f"../{room}" for room in ROOMS}


def test_the_wheel_holds_every_source_file_once_and_nothing_else(tmp_path: pathlib.Path) -> None:
    build = "import sys, hatchling.build; print(hatchling.build.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=100, check=True
    )
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        held = sorted(name for name in wheel.namelist() if ".dist-info/" not in name)
    face = ["folovllm/__init__.py", "folovllm/__main__.py", "folovllm/py.typed"]
    page = [f"folovllm/{file.relative_to(ROOT)}" for file in (ROOT / "frontend/server/page").iterdir()]
    assert held == sorted(face + page + [f"folovllm/{file.name}" for file in source_files()])


def test_every_public_name_resolves_and_is_listed() -> None:
    for name in folovllm.__all__:
        assert getattr(folovllm, name) is not None
        assert name in dir(folovllm)


def test_the_lazy_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse((ROOT / "folovllm" / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == folovllm._HOME_OF
    assert {*seen, "__version__"} == set(folovllm.__all__)


def test_a_name_that_does_not_exist_is_refused() -> None:
    module: typing.Any = folovllm
    with pytest.raises(AttributeError, match="has no attribute 'LLMM'"):
        _ = module.LLMM

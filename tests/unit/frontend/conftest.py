"""A fake core in a thread, and a model folder, for tests of what stands on the connection."""

import io
import pathlib
import sys
from collections.abc import Callable, Iterator

import pytest

from folovllm.frontend.cli.main import run
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.model_folder import write_model_folder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def core(model_folder: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[FakeCore]:
    """Answers with the prompt backwards, again and again."""
    with FakeCore(f"ipc://{tmp_path}/core", model=str(model_folder)) as fake:
        yield fake


@pytest.fixture
def folo(core: FakeCore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command against the fake core; returns exit code, stdout, stderr."""

    def call(*args: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = run([*args, "--engine", core.endpoint])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call

"""A fake core in a thread, and a model folder, for tests of what stands on the connection."""

import pathlib
from collections.abc import Iterator

import pytest

from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.model_folder import write_model_folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def core(model_folder: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[FakeCore]:
    """Answers with the prompt backwards, again and again."""
    with FakeCore(f"ipc://{tmp_path}/core", model=str(model_folder)) as fake:
        yield fake

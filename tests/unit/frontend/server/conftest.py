"""Cores that follow a script, for the tests of chat-like endpoints."""

import json
import pathlib
from collections.abc import Callable, Iterator

import pytest

from folovllm.frontend.server.parsers import registry
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.model_folder import CHAT_TEMPLATE, IM_END, ids_of, write_model_folder
from tests.fakes.parsers import CALLS, THOUGHTS

Script = Callable[[str], FakeCore]


@pytest.fixture(scope="session")
def tool_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model whose chat template knows tools and calls of them."""
    folder = write_model_folder(tmp_path_factory.mktemp("tools") / "tiny")
    template = "{{ tools | length if tools }}" + CHAT_TEMPLATE.replace(
        "{{ message.content }}", "{{ message.content }}{% for call in message.tool_calls or [] %}{{ call }}{% endfor %}"
    )
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def saying(tool_folder: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Script]:
    """Makes a core whose every answer is a text, then the end of sequence."""
    cores: list[FakeCore] = []

    def make(text: str) -> FakeCore:
        ids = [*ids_of(text), IM_END]
        endpoint = f"ipc://{tmp_path}/saying{len(cores)}"
        core = FakeCore(endpoint, lambda *_: ids, model=str(tool_folder), max_model_len=512)
        cores.append(core.__enter__())
        return core

    yield make
    for core in cores:
        core.close()


@pytest.fixture
def endless(model_folder: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[FakeCore]:
    """A core whose answers do not end by themselves within a test."""
    ids = [65] * 150_000
    with FakeCore(f"ipc://{tmp_path}/endless", lambda *_: ids, model=str(model_folder), max_model_len=200_000) as core:
        yield core


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Options of a server whose model writes the made-up markup of `tests.fakes.parsers`."""
    monkeypatch.setattr(registry, "TOOL_FORMATS", {"test": CALLS})
    monkeypatch.setattr(registry, "REASONING_FORMATS", {"test": THOUGHTS})
    return {"tool_parser": "test", "reasoning_parser": "test"}

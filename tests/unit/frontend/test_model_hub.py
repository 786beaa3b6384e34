import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from folovllm.common.errors import ModelError
from folovllm.frontend import demo_model
from folovllm.frontend.model_hub import resolve


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("as_text", [True, False])
def test_a_local_folder_is_itself(tmp_path: Path, as_text: bool) -> None:
    folder = make_model(tmp_path / "m")
    assert resolve(str(folder) if as_text else folder) == folder


def test_a_folder_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = make_model(tmp_path / "m")
    assert resolve("~/m") == folder


def test_a_folder_without_config_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing \(found: nothing\)"):
        resolve(tmp_path)
    (tmp_path / "weights.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"found: weights\.gguf.*GGUF files cannot be loaded"):
        resolve(tmp_path)


@pytest.mark.parametrize("name", ["nothing-of-that-name", "./absent/folder", "a/b/c", "", "http://x/y"])
def test_an_unknown_name_is_refused_with_the_three_possibilities(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        resolve(name)
    message = str(caught.value)
    if name:
        assert all(part in message for part in ("local folder", "'demo'", "'organisation/name'"))
    else:
        assert "config.json is missing" in message  # "" is the working folder


@pytest.mark.parametrize("model", [3, None, b"demo"])
def test_what_is_no_name_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="must be a folder, 'demo' or a hub id"):
        resolve(model)


def test_demo_is_the_demo_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_model, "demo_model_dir", lambda: tmp_path / "made")
    assert resolve("demo") == tmp_path / "made"
    (tmp_path / "demo").mkdir()
    assert resolve("demo") == tmp_path / "made"
    make_model(tmp_path / "demo")
    assert resolve("demo") == Path("demo")


def test_a_hub_id_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, list[str], list[str]]] = []

    def snapshot_download(repo_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns, ignore_patterns))
        return str(make_model(tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("org/some-model.1") == tmp_path / "snapshot"
    assert asked[0][0] == "org/some-model.1"
    assert "*.safetensors" in asked[0][1]
    assert "original/*" in asked[0][2]


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("no connection\nand a long explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        ModelError, match=r"cannot get model 'org/name'.*no connection\).*give its folder, or use 'demo'"
    ):
        resolve("org/name")


def test_without_huggingface_hub_a_hub_id_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match="pip install huggingface_hub"):
        resolve("org/name")

import pathlib
import subprocess
from collections.abc import Sequence

import pytest

from bench import quantized
from folovllm.common.quantize_job import work_folder


def test_a_copy_that_is_not_finished_is_not_measured(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Sequence[str]] = []

    def finished(command: Sequence[str], *, check: bool) -> None:
        assert check
        commands.append(command)
        out = pathlib.Path(command[5])
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").touch()
        if work_folder(out).is_dir():
            work_folder(out).rmdir()

    monkeypatch.setattr(quantized, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(subprocess, "run", finished)
    out = quantized.quantized_copy(pathlib.Path("/models/demo"), quick=True)
    assert commands[0][3:6] == ["quantize", "/models/demo", str(out)] and out.is_relative_to(tmp_path)
    assert quantized.quantized_copy(pathlib.Path("/models/demo"), quick=True) == out
    assert len(commands) == 1  # it was there
    work_folder(out).mkdir()  # the command was interrupted after config.json was written, before the end
    assert quantized.quantized_copy(pathlib.Path("/models/demo"), quick=True) == out
    assert commands[1] == commands[0]
    assert quantized.quantized_copy(pathlib.Path("/models/demo"), quick=False) != out

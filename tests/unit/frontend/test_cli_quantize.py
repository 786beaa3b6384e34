"""`folovllm quantize`: what it hands to the process that does the work."""

import pathlib
from collections.abc import Sequence

import pytest

from folovllm.common import child_process
from folovllm.common.quantize_job import QuantizeJob, read_job, work_folder
from folovllm.frontend.cli.main import run
from tests.fakes.model_folder import write_model_folder


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[QuantizeJob]:
    taken: list[QuantizeJob] = []

    def run_module(module: str, arguments: Sequence[str]) -> int:
        assert module == "folovllm.worker_proc.quantize"
        (path,) = arguments
        taken.append(read_job(pathlib.Path(path)))
        return 0

    monkeypatch.setattr(child_process, "run_module", run_module)
    return taken


@pytest.fixture
def model(tmp_path: pathlib.Path) -> str:
    return str(write_model_folder(tmp_path / "model"))


def test_defaults(jobs: list[QuantizeJob], model: str, tmp_path: pathlib.Path) -> None:
    assert run(["quantize", model, str(tmp_path / "out")]) == 0
    (job,) = jobs
    assert (job.bits, job.group_size, job.sym, job.desc_act, job.head) == (4, 128, True, False, False)
    assert job.quantizer in ("own", "gptqmodel") and job.device == "auto"
    assert len(job.calibration) == 128 and {len(sample) for sample in job.calibration} == {512}
    assert len(job.evaluation) == 32 and not any(sample in job.calibration for sample in job.evaluation)
    assert "pydoc_data.topics" in job.evaluation_name


def test_options(jobs: list[QuantizeJob], model: str, tmp_path: pathlib.Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four " * 50)
    options = "--bits 8 --group-size -1 --asymmetric --desc-act --head --num-samples 3 --sample-tokens 20"
    more = ["--quantizer", "own", "--device", "cpu", "--calibration", str(text)]
    assert run(["quantize", model, str(tmp_path / "out"), *options.split(), *more]) == 0
    (job,) = jobs
    assert (job.bits, job.group_size, job.sym, job.desc_act, job.head) == (8, -1, False, True, True)
    assert (job.quantizer, job.device) == ("own", "cpu")
    assert [len(sample) for sample in job.calibration] == [20] * 3


def test_wrong_input(
    jobs: list[QuantizeJob], model: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert run(["quantize", model, out, "--bits", "3"]) == 2
    assert run(["quantize", model, out, "--calibration", str(tmp_path / "no.txt")]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert run(["quantize", model, model]) == 2
    assert "not empty: give a new folder" in capsys.readouterr().err
    assert run(["quantize", model, out]) == run(["quantize", model, out]) == 0
    assert run(["quantize", model, out, "--head"]) == 2
    assert "unfinished job with other options" in capsys.readouterr().err
    assert work_folder(pathlib.Path(out)).is_dir() and len(jobs) == 2


def test_samples_longer_than_the_model(
    jobs: list[QuantizeJob], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(write_model_folder(tmp_path / "model", max_position_embeddings=100)), tmp_path / "out"
    assert run(["quantize", model, str(out)]) == 2
    assert "512 tokens are more than the model's 100 positions: give at most 100" in capsys.readouterr().err
    assert run(["quantize", model, str(out), "--sample-tokens", "101"]) == 2
    assert not out.exists() and not jobs  # refused before the job begins: another length may be given
    assert run(["quantize", model, str(out), "--sample-tokens", "100"]) == 0

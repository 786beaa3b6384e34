import pathlib
import shutil
import sys
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch

from folovllm.common.errors import ConfigError
from folovllm.common.quantize_job import QuantizeJob, begin_job
from folovllm.worker_proc.quantization.with_gptqmodel import quantize_with_gptqmodel
from folovllm.worker_proc.quantize import main
from tests.fakes.tiny_models import make_model

SAMPLES = torch.randint(3, 40000, (10, 256), generator=torch.Generator().manual_seed(0)).tolist()


def job_for(tmp_path: pathlib.Path) -> QuantizeJob:
    return QuantizeJob(
        model=str(tmp_path / "model"),
        out=str(tmp_path / "out"),
        group_size=32,
        device="cpu",
        quantizer="gptqmodel",
        calibration=SAMPLES[:8],
        evaluation=SAMPLES[8:],
        evaluation_name="random numbers",
    )


def test_without_the_package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    with pytest.raises(ConfigError, match=r"pip install 'folovllm\[quant\]'"):
        quantize_with_gptqmodel(job_for(tmp_path), torch.device("cpu"))


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("cuda", 1)])
def test_it_is_told_all_of_the_job(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    package = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "gptqmodel", package)
    job = msgspec.structs.replace(job_for(tmp_path), bits=8, sym=False, desc_act=True, head=True, damping=0.1)
    quantize_with_gptqmodel(job, device)
    package.QuantizeConfig.assert_called_once_with(
        bits=8, group_size=32, sym=False, desc_act=True, damp_percent=0.1, lm_head=True, device=device.type
    )
    package.GPTQModel.load.assert_called_once_with(job.model, package.QuantizeConfig.return_value)
    model = package.GPTQModel.load.return_value
    ((samples,), _) = model.quantize.call_args
    assert [sample["input_ids"] for sample in samples] == job.calibration
    model.save.assert_called_once_with(job.out)


def test_an_interrupted_one_does_not_go_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = mock.MagicMock()
    package.GPTQModel.load.return_value.quantize.side_effect = KeyboardInterrupt
    monkeypatch.setitem(sys.modules, "gptqmodel", package)
    make_model(tmp_path / "model", "llama")
    few = [[1, 2, 3], [4, 5, 6]]
    job = msgspec.structs.replace(job_for(tmp_path), calibration=few, evaluation=few)
    for _ in range(2):
        assert main([str(begin_job(job))]) == 130
        assert "the same command begins again" in capsys.readouterr().err
    assert package.GPTQModel.load.call_count == 2


def test_its_own_checkpoint_is_read(
    tmp_path: pathlib.Path, demo_model_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # with one it does not start
    pytest.importorskip("gptqmodel", reason="the package gptqmodel is not installed")
    sizes: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": 128,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
    }
    folder = make_model(tmp_path / "model", "llama", dtype=torch.bfloat16, **sizes)
    for path in demo_model_dir.glob("*token*.json"):
        shutil.copy(path, folder)
    job = job_for(tmp_path)
    assert main([str(begin_job(job))]) == 0

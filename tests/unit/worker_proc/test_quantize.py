"""The program: a tiny model quantized for real, and read back as an engine would."""

import json
import pathlib
import re
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch

from folovllm.common.errors import ConfigError, ModelError
from folovllm.common.model_config import read_model_config
from folovllm.common.quantize_job import QuantizeJob, begin_job, work_folder
from folovllm.worker_proc import quantize
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.models.registry import build_model
from folovllm.worker_proc.quantization import quantizer
from folovllm.worker_proc.quantization.calibration import perplexity
from folovllm.worker_proc.quantization.config import read_gptq_config
from folovllm.worker_proc.quantization.registry import linear_maker
from folovllm.worker_proc.weights import load_weights
from tests.fakes.tiny_models import make_model

SAMPLES = torch.randint(0, 200, (8, 24), generator=torch.Generator().manual_seed(0)).tolist()


def job_for(tmp_path: pathlib.Path, family: str = "llama", **changes: Any) -> QuantizeJob:
    model = make_model(tmp_path / "model", family, vocab_size=200, **changes.pop("fields", {}))
    made = QuantizeJob(
        model=str(model),
        out=str(tmp_path / "out"),
        group_size=32,
        device="cpu",
        calibration=SAMPLES[:6],
        evaluation=SAMPLES[6:],
        evaluation_name="random numbers",
    )
    return msgspec.structs.replace(made, **changes)


def stored(folder: str) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(pathlib.Path(folder).glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(path).items()
    }


def run(job: QuantizeJob) -> int:
    return quantize.main([str(begin_job(job))])


CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2, asymmetric, in activation order": {"family": "qwen2", "sym": False, "desc_act": True, "group_size": 16},
    "qwen3, tied, with its head, in shards": {
        "family": "qwen3",
        "head": True,
        "fields": {"tie_word_embeddings": True, "shard_size": "40KB"},
    },
    "8 bits, untied head": {"bits": 8, "group_size": -1, "head": True},
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_model_is_quantized_and_read_back(
    tmp_path: pathlib.Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_for(tmp_path, **CASES[name])
    assert run(job) == 0
    report = capsys.readouterr().out
    numbers = re.search(r"perplexity +([\d.]+) +before +([\d.]+) +after", report)
    assert numbers and "46 tokens of random numbers" in report
    before, after = (float(number) for number in numbers.groups())
    assert 0.5 < after / before < 2
    config = json.loads((pathlib.Path(job.out) / "config.json").read_text())
    fields = config["quantization_config"]
    assert (fields["bits"], fields["group_size"], fields["sym"]) == (job.bits, job.group_size, job.sym)
    assert fields["quant_method"] == fields["checkpoint_format"] == "gptq" and fields["lm_head"] == job.head
    assert config["tie_word_embeddings"] == (json.loads((pathlib.Path(job.model) / "config.json").read_text())[
        "tie_word_embeddings"] and not job.head)  # fmt: skip
    old, new = stored(job.model), stored(job.out)
    linears = {name for name in old if "_proj.weight" in name}
    assert {name for name in old if name not in new} - {"lm_head.weight"} == linears
    assert all(torch.equal(old[name], new[name]) for name in old.keys() & new.keys())
    assert ("lm_head.qweight" in new) == job.head
    assert not work_folder(pathlib.Path(job.out)).exists()


def test_an_interrupted_job_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_for(tmp_path)
    calls: list[tuple[Any, ...]] = []
    inner = quantizer.quantize

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return inner(*arguments)

    monkeypatch.setattr("folovllm.worker_proc.quantize.quantize", counted)
    assert run(job) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert len(list(work_folder(pathlib.Path(job.out)).glob("*.safetensors"))) == 3
    assert run(job) == 0
    assert len(calls) == 4 + 5  # of eight layers three were there
    monkeypatch.undo()
    whole = msgspec.structs.replace(job, out=str(tmp_path / "whole"))
    assert run(whole) == 0
    one, other = stored(job.out), stored(whole.out)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_cannot_be_quantized(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_for(tmp_path)
    assert run(job) == 0
    again = msgspec.structs.replace(job, model=job.out, out=str(tmp_path / "again"))
    assert run(again) == 2
    assert "is quantized already" in capsys.readouterr().err
    odd = job_for(tmp_path / "odd", fields={"intermediate_size": 100})
    assert run(odd) == 2
    assert "gate_proj has size 100, which cannot be packed" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_job_takes_what_an_engine_loads(tmp_path: pathlib.Path, bits: int) -> None:
    job = job_for(tmp_path)
    for size in (-1, 0, 8, 15, 16, 20, 128, 1024, 1032):
        for error, taken_by in (
            (ConfigError, lambda size=size: msgspec.structs.replace(job, bits=bits, group_size=size)),
            (ModelError, lambda size=size: read_gptq_config({"bits": bits, "group_size": size})),
        ):
            if bits in (4, 8) and (size in (-1, 16, 128, 1024) or (size, bits) == (20, 8)):
                taken_by()
            else:
                with pytest.raises(error, match=r"3 bits|not supported|multiple of"):
                    taken_by()


def test_the_report_is_of_the_files_that_were_written(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_for(tmp_path)
    assert run(job) == 0
    placement, folder = Placement(torch.device("cpu"), torch.float32), pathlib.Path(job.out)
    config = read_model_config(folder)
    model = build_model(config, placement, 64, linear_maker(config, placement, folder))
    load_weights(model, folder)
    with torch.inference_mode():
        assert f"{perplexity(model, torch.tensor(job.evaluation)):.3f}" in capsys.readouterr().out

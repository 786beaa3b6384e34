"""The copy with 4-bit weights that the GPU benchmark makes, and what it puts beside the goals."""

import pathlib

import pytest
import torch

from bench import four_bits
from bench.four_bits import Measured, layer_bytes, measure_both, write_copy
from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.models.registry import build_model
from folovllm.worker_proc.quantization.registry import linear_maker
from folovllm.worker_proc.weights import load_weights
from tests.fakes.tiny_models import make_model


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    return make_model(tmp_path / "source", "qwen3")


def test_the_copy_is_a_checkpoint_that_loads(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write_copy(source, tmp_path / "copy")
    config, placement = read_model_config(tmp_path / "copy"), Placement(torch.device("cpu"), torch.float32)
    assert config.quantization is not None
    model = build_model(config, placement, 64, linear_maker(config, placement, tmp_path / "copy"))
    load_weights(model, tmp_path / "copy")
    with torch.inference_mode():
        product = model.parts().layers[1].down(torch.ones(1, 96))
    assert 0 < product.abs().max() < 3  # of the size that weights have


def test_without_weights_there_are_none_in_the_copy(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (source / "model.safetensors").unlink()
    write_copy(source, tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["config.json"]
    assert layer_bytes(source, "cpu") == 2 * 2 * (64 * 128 + 64 * 64 + 3 * 64 * 96)


def test_what_is_put_beside_the_goals(source: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"bf16": Measured({1: 1.0, 2: 1.5}, 1000.0, 4.0), "4 bits": Measured({1: 0.5, 2: 0.75}, 900.0, 5.0)}
    seen: list[tuple[bool, str]] = []

    def run(folder: pathlib.Path, label: str) -> Measured:
        seen.append((read_model_config(folder).quantization is not None, label))
        return measured[label]

    monkeypatch.setattr(four_bits, "layer_bytes", lambda folder, device: 26 if folder.name == "four_bits" else 100)
    assert measure_both(source, "cpu", run) == [
        ["step of 1, ms", 1.0, 0.5, "<= 0.92"],
        ["step of 2, ms", 1.5, 0.75, ""],
        ["layer weights, times bf16's", 1, 0.26, "<= 0.28"],
        ["prompt tokens/s, times bf16's", 1, 0.9, ">= 0.9"],
        ["load, times bf16's", 1, 1.25, "<= 1.5"],
    ]
    assert seen == [(False, "bf16"), (True, "4 bits")]

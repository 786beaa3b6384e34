"""Checkpoints as they are written: what lies in which file, and what an interrupted write leaves."""

import json
import pathlib
from collections import Counter
from typing import Any

import pytest
import safetensors.torch
import torch

from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.quantization.checkpoint import packed_tensors, split_outputs, write_checkpoint
from folovllm.worker_proc.quantization.config import Scheme
from folovllm.worker_proc.quantization.quantizer import Recipe, round_to_nearest
from folovllm.worker_proc.quantization.storage import unpack_rows
from folovllm.worker_proc.quantize import load_model
from folovllm.worker_proc.weights import checkpoint_files, stored_shapes
from tests.fakes.tiny_models import make_model

RECIPE = Recipe(Scheme(4, 32, sym=True))
KINDS = ("qweight", "qzeros", "scales", "g_idx")


def packed_of(folder: pathlib.Path, *, head: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Every linear weight of the model, rounded to nearest; with `head` lm_head's or the embedding's."""
    stored = {
        name: tensor for path in checkpoint_files(folder) for name, tensor in safetensors.torch.load_file(path).items()
    }
    weights = {name.removesuffix(".weight"): tensor for name, tensor in stored.items() if "_proj.weight" in name}
    if head:
        weights["lm_head"] = stored.get("lm_head.weight", stored["model.embed_tokens.weight"])
    return {
        name: packed_tensors(round_to_nearest(each, RECIPE.scheme), RECIPE.scheme) for name, each in weights.items()
    }


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_written_once_wherever_it_is_stored(tmp_path: pathlib.Path, tied: bool, shard_size: str) -> None:
    fields: dict[str, Any] = {"vocab_size": 200, "tie_word_embeddings": tied, "shard_size": shard_size}
    source, target = make_model(tmp_path / "model", "llama", **fields), tmp_path / "out"
    packed = packed_of(source, head=True)
    write_checkpoint(source, target, packed, RECIPE)
    held = {path.name: list(safetensors.torch.load_file(path)) for path in checkpoint_files(target)}
    assert len(held) == len(checkpoint_files(source)) and (len(held) > 1) == (shard_size != "1GB")
    counts = Counter(name for names in held.values() for name in names)
    assert set(counts.values()) == {1} and {f"lm_head.{kind}" for kind in KINDS} <= counts.keys()
    assert "lm_head.weight" not in counts
    if len(held) > 1:
        index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
        assert index == {name: file for file, names in held.items() for name in names}
    with torch.inference_mode():
        load_model(target, torch.device("cpu"))  # as an engine would


def test_without_the_head_it_stays_as_it_is(tmp_path: pathlib.Path) -> None:
    source, target = make_model(tmp_path / "model", "llama", shard_size="40KB"), tmp_path / "out"
    write_checkpoint(source, target, packed_of(source, head=False), RECIPE)
    names = stored_shapes(target)
    assert names["lm_head.weight"] == stored_shapes(source)["lm_head.weight"] and "lm_head.qweight" not in names
    quantization = read_model_config(target).quantization
    assert quantization is not None and quantization.fields["lm_head"] is False


def test_a_folder_that_has_a_configuration_is_whole(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = make_model(tmp_path / "model", "llama"), tmp_path / "out"
    packed = packed_of(source, head=False)
    (source / "vocab.txt").write_text("a b")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for _ in range(2):  # the second time over a finished one
        with monkeypatch.context() as patch:
            patch.setattr(safetensors.torch, "save_file", interrupted)
            with pytest.raises(KeyboardInterrupt):
                write_checkpoint(source, target, packed, RECIPE)
        assert not (target / "config.json").exists() and (target / "vocab.txt").read_text() == "a b"
        write_checkpoint(source, target, packed, RECIPE)
        assert read_model_config(target).quantization is not None


def test_a_fused_weight_is_taken_apart_by_outputs() -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    whole = round_to_nearest(weight, RECIPE.scheme)
    parts = split_outputs(whole, {"q_proj": 16, "k_proj": 8})
    plain = torch.cat([part.dequantize() for part in parts.values()])
    assert list(parts) == ["q_proj", "k_proj"] and torch.equal(plain, whole.dequantize())
    stored = packed_tensors(parts["k_proj"], RECIPE.scheme)
    assert tuple(stored) == KINDS and stored["scales"].dtype == torch.float16
    assert torch.equal(unpack_rows(stored["qweight"], 4), whole.numbers[:, 16:])

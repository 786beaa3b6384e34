import pathlib

import pytest
import safetensors.torch
import torch

from folovllm.common.errors import ModelError
from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.attention.torch_naive import TorchNaiveBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.models.registry import CausalLM, build_model
from folovllm.worker_proc.weights import checkpoint_dtype, checkpoint_files, load_weights, stored_shapes
from tests.fakes.attention import PagedRequest, build_metadata
from tests.fakes.tiny_models import VOCAB_SIZE, edit_config, edit_tensors, load_reference, make_model

IDS = torch.tensor([5, 17, 150, 3, 88])


def load(folder: pathlib.Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    model = build_model(read_model_config(folder), Placement(torch.device("cpu"), dtype), 64)
    load_weights(model, folder)
    return model


@torch.inference_mode()
def logits_of(model: CausalLM, folder: pathlib.Path) -> torch.Tensor:
    kv = KVTensors(read_model_config(folder), 2, 8, Placement(torch.device("cpu"), torch.float32))
    step = TorchNaiveBackend().begin_step(kv, build_metadata([PagedRequest([1])], [len(IDS)], 8))
    return model.compute_logits(model.forward(IDS, torch.arange(len(IDS)), step))


def reference(folder: pathlib.Path) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = load_reference(folder)(IDS[None]).logits[0]
        return logits


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-4, rtol=0)


def test_L38_missing_shard_is_named(tmp_path: pathlib.Path) -> None:
    make_model(tmp_path, "llama", shard_size="40KB")
    shards = checkpoint_files(tmp_path)
    assert len(shards) > 2
    assert close(logits_of(load(tmp_path), tmp_path), reference(tmp_path))
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"shard {shards[1].name} is named by .*index.json but does not exist"):
        load(tmp_path)


def test_L38_spare_head_of_a_tied_model_does_not_count(tmp_path: pathlib.Path) -> None:
    make_model(tmp_path, "llama", tie_word_embeddings=True)
    expected = reference(tmp_path)
    edit_tensors(tmp_path, {"lm_head.weight": torch.zeros(VOCAB_SIZE, 64)})
    assert close(logits_of(load(tmp_path), tmp_path), expected)


def test_L38_untied_head_differs_from_the_embedding(tmp_path: pathlib.Path) -> None:
    make_model(tmp_path, "qwen3", tie_word_embeddings=False)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert close(logits_of(load(tmp_path), tmp_path), reference(tmp_path))


def test_L38_untied_model_without_head_is_refused(tmp_path: pathlib.Path) -> None:
    make_model(tmp_path, "llama", tie_word_embeddings=False)
    edit_tensors(tmp_path, {}, remove=("lm_head.weight",))
    with pytest.raises(ModelError, match=r"tensor 'lm_head.weight' is missing from the checkpoint"):
        load(tmp_path)


def test_L38_tensor_too_many_is_named(tmp_path: pathlib.Path) -> None:
    make_model(tmp_path, "llama")
    edit_tensors(tmp_path, {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})
    with pytest.raises(ModelError, match=r"model.safetensors: tensor 'model.layers.0.self_attn.q_norm.weight' is not"):
        load(tmp_path)


def test_a_layer_too_many_and_a_layer_too_few(tmp_path: pathlib.Path) -> None:
    make_model(tmp_path, "qwen2")
    edit_config(tmp_path, num_hidden_layers=1, layer_types=None)
    with pytest.raises(ModelError, match=r"tensor 'model\.layers\.1\."):
        load(tmp_path)
    edit_config(tmp_path, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"tensors 'model\.layers\.2\..* and 8 more are missing"):
        load(tmp_path)


def test_inverse_frequencies_of_old_checkpoints_are_passed_over(tmp_path: pathlib.Path) -> None:
    make_model(tmp_path, "llama")
    expected = reference(tmp_path)
    edit_tensors(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    assert close(logits_of(load(tmp_path), tmp_path), expected)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(65), r"'model.norm.weight' has shape \[65\], but config.json asks for \[64\]"),
        (torch.ones(64, dtype=torch.int8), r"'model.norm.weight' is stored as torch.int8; supported are bfloat16"),
    ],
)
def test_wrong_shape_or_type_is_named(tmp_path: pathlib.Path, tensor: torch.Tensor, message: str) -> None:
    make_model(tmp_path, "llama")
    edit_tensors(tmp_path, {"model.norm.weight": tensor})
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_damaged_and_absent_files_are_named(tmp_path: pathlib.Path) -> None:
    make_model(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model.safetensors is damaged"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(ModelError, match=r"has no weights: neither model.safetensors nor"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match=r"index.json: Expected `object`"):
        load(tmp_path)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_types_are_cast(tmp_path: pathlib.Path, stored: torch.dtype) -> None:
    make_model(tmp_path, "llama", dtype=stored)
    assert checkpoint_dtype(tmp_path) == str(stored).removeprefix("torch.")
    assert close(logits_of(load(tmp_path), tmp_path), reference(tmp_path))
    tensors = dict(load(tmp_path, torch.float16).checkpoint_tensors())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_type_and_shapes_of_a_checkpoint_with_packed_numbers(tmp_path: pathlib.Path) -> None:
    make_model(tmp_path, "llama", dtype=torch.bfloat16)
    packed = torch.zeros(8, 64, dtype=torch.int32)
    edit_tensors(tmp_path, {"a.first.qweight": packed})
    assert checkpoint_dtype(tmp_path) == "bfloat16"
    shapes = stored_shapes(tmp_path)
    assert shapes["a.first.qweight"] == (8, 64) and shapes["model.embed_tokens.weight"] == (VOCAB_SIZE, 64)
    with pytest.raises(ModelError, match=r"'a\.first\.qweight' is not part of this model"):
        load(tmp_path)

"""Models as GGUF, read back with the gguf package."""

import pathlib

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from bench.peers.gguf_file import interleaved_rows, write_gguf
from bench.peers.peer import PeerError
from folovllm.frontend.demo_model import unpermute_rotary_rows
from tests.fakes.model_folder import write_model_folder

SHAPES = {
    "model.embed_tokens.weight": (272, 32),
    "model.norm.weight": (32,),
    "model.layers.0.input_layernorm.weight": (32,),
    "model.layers.0.self_attn.q_proj.weight": (32, 32),
    "model.layers.0.self_attn.k_proj.weight": (16, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 64),
}


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A few tensors of a model, in bfloat16."""
    folder = write_model_folder(tmp_path / "model", with_tokenizer=False)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder


def read(path: pathlib.Path) -> tuple[gguf.GGUFReader, dict[str, torch.Tensor]]:
    """The file, and its tensors as float32."""
    reader = gguf.GGUFReader(path)
    values = {}
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            values[tensor.name] = torch.from_numpy(np.array(tensor.data)).view(torch.bfloat16).float()
        else:
            values[tensor.name] = torch.from_numpy(np.array(tensor.data))
    return reader, values


def test_matrices_are_the_same_bits_and_vectors_the_same_numbers(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write_gguf(folder, tmp_path / "model.gguf")
    reader, values = read(tmp_path / "model.gguf")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    }
    for name, original in names.items():
        assert torch.equal(values[name], tensors[original].float()), name
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (kinds["output_norm.weight"], kinds["blk.0.ffn_down.weight"]) == ("F32", "BF16")


def test_llamas_heads_are_interleaved_as_the_demo_models_were(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The demo model comes from a GGUF, and its rows were brought back from that order."""
    write_gguf(folder, tmp_path / "model.gguf")
    _, values = read(tmp_path / "model.gguf")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for part, heads in (("q", 4), ("k", 2)):
        back = unpermute_rotary_rows(values[f"blk.0.attn_{part}.weight"].numpy(), heads)
        assert np.array_equal(back, tensors[f"model.layers.0.self_attn.{part}_proj.weight"].float().numpy())


def test_qwen3s_heads_stay_as_they_are(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write_model_folder(folder, with_tokenizer=False, architectures=["Qwen3ForCausalLM"])
    write_gguf(folder, tmp_path / "model.gguf")
    _, values = read(tmp_path / "model.gguf")
    original = safetensors.torch.load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(values["blk.0.attn_q.weight"], original.float())


def test_interleaving_pairs_the_halves_of_a_head() -> None:
    rows = torch.arange(8.0).view(8, 1)
    assert interleaved_rows(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_shape_is_told_and_there_is_no_vocabulary(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write_gguf(folder, tmp_path / "model.gguf")
    fields = read(tmp_path / "model.gguf")[0].fields
    numbers = {
        name: fields[f"llama.{name}"].contents() for name in ("block_count", "attention.head_count_kv", "vocab_size")
    }
    assert numbers == {"block_count": 2, "attention.head_count_kv": 2, "vocab_size": 272}
    assert fields["tokenizer.ggml.model"].contents() == "no_vocab"


def test_what_is_not_converted_is_named_and_leaves_no_file(tmp_path: pathlib.Path) -> None:
    folder = write_model_folder(tmp_path / "model", with_tokenizer=False, architectures=["Qwen2ForCausalLM"])
    with pytest.raises(PeerError, match="Qwen2ForCausalLM with default rotary embedding is not written as GGUF"):
        write_gguf(folder, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

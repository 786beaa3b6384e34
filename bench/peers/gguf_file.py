"""A model's folder as GGUF in bfloat16, for llama.cpp: weights and numbers only, since prompts are token ids.

    python -m bench.peers.gguf_file FOLDER FILE.gguf

llama.cpp's own `convert_hf_to_gguf.py --outtype bf16` writes the same weights; it needs llama.cpp's sources and a
tokenizer that it knows.
"""

import argparse
import pathlib
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from bench.peers.peer import PeerError
from folovllm.common.model_config import ModelConfig, read_model_config

_ARCHITECTURES = {"LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA, "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3}


def interleaved_rows(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp's rotary embedding of Llama pairs them: [out, in], halves of a head interleaved."""
    rows, columns = weight.shape
    halves = weight.view(num_heads, 2, rows // num_heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def _add_numbers(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")


def _values(name: str, tensor: torch.Tensor, config: ModelConfig) -> tuple[npt.NDArray[Any], Any]:
    """A tensor as GGUF has it: matrices in bfloat16, their bytes last; vectors in float32."""
    if tensor.dim() == 1:
        return tensor.float().numpy(), gguf.GGMLQuantizationType.F32
    if config.architecture == "LlamaForCausalLM" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        tensor = interleaved_rows(tensor, heads)
    bits = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    return bits.astype(np.uint8, copy=False), gguf.GGMLQuantizationType.BF16


def write_gguf(folder: pathlib.Path, path: pathlib.Path) -> None:
    """Writes `path`; a file that was begun and not finished is not left there.

    Raises:
        PeerError: the model is of a kind that is not converted here.
    """
    config = read_model_config(folder)
    if config.architecture not in _ARCHITECTURES or config.rope.rope_type != "default":
        kind = f"{config.architecture} with {config.rope.rope_type} rotary embedding"
        raise PeerError(f"{kind} is not written as GGUF; {', '.join(_ARCHITECTURES)} with the default one are")
    arch = _ARCHITECTURES[config.architecture]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[arch])
    _add_numbers(writer, config)
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in safetensors.torch.load_file(file).items():
            values, kind = _values(name, tensor, config)
            writer.add_tensor(names.get_name(name, (".weight",)), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("file", type=pathlib.Path)
    given = parser.parse_args()
    write_gguf(given.folder, given.file)


if __name__ == "__main__":
    main()

"""Writes a quantized checkpoint: the model's folder once more, with packed numbers in place of linear weights.

Shard by shard, so that no more than one shard is in memory. The layout and the fields of `quantization_config` are
those that GPTQModel writes, which transformers and vLLM read.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch

from folovllm.worker_proc.quantization.config import Scheme
from folovllm.worker_proc.quantization.quantizer import Recipe
from folovllm.worker_proc.quantization.storage import Quantized, pack_rows, pack_zeros
from folovllm.worker_proc.weights import checkpoint_files, stored_shapes

_INDEX_FILE = "model.safetensors.index.json"
_CONFIG_FILE = "config.json"
_LEFT_OUT = (".safetensors", ".bin", ".pth", ".gguf", _INDEX_FILE, _CONFIG_FILE)
_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens.weight"


def packed_tensors(weight: Quantized, scheme: Scheme) -> dict[str, torch.Tensor]:
    """What a checkpoint stores of a weight, by the last word of its name; format `gptq`."""
    return {
        "qweight": pack_rows(weight.numbers, scheme.bits),
        "qzeros": pack_zeros(weight.zeros, scheme.bits, minus_one=True),
        "scales": weight.scales.half().contiguous(),
        "g_idx": weight.groups.to(torch.int32),
    }


def split_outputs(weight: Quantized, parts: Mapping[str, int]) -> dict[str, Quantized]:
    """A fused weight's projections, by name."""
    sizes = list(parts.values())
    numbers, zeros, scales = (each.split(sizes, 1) for each in (weight.numbers, weight.zeros, weight.scales))
    return {name: Quantized(numbers[i], zeros[i], scales[i], weight.groups) for i, name in enumerate(parts)}


def write_checkpoint(
    source: pathlib.Path, target: pathlib.Path, packed: Mapping[str, Mapping[str, torch.Tensor]], recipe: Recipe
) -> None:
    """Writes `source` with the modules of `packed` (full name → its tensors) quantized to `target`.

    config.json comes last, and one that an earlier call left goes first: a folder that has it is whole.
    """
    target.mkdir(parents=True, exist_ok=True)
    (target / _CONFIG_FILE).unlink(missing_ok=True)
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_LEFT_OUT):
            shutil.copyfile(path, target / path.name)
    weight_map: dict[str, str] = {}
    size = 0
    files = checkpoint_files(source)
    # A tied head is stored nowhere: it is written where the embedding is. Another has its own place, maybe in a shard
    # of its own, and a tensor that two shards hold cannot be loaded.
    tied_head = packed.get(_HEAD) if f"{_HEAD}.weight" not in stored_shapes(source) else None
    for path in files:
        tensors = _of_shard(path, packed, tied_head or {})
        safetensors.torch.save_file(tensors, target / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (target / _INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    fields = _config(source / _CONFIG_FILE, recipe, head=_HEAD in packed)
    (target / _CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")


def _of_shard(
    path: pathlib.Path, packed: Mapping[str, Mapping[str, torch.Tensor]], tied_head: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A shard's tensors, with `tied_head`'s beside the embedding."""
    tensors: dict[str, torch.Tensor] = {}
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            module = name.removesuffix(".weight")
            if name == _EMBEDDING:
                tensors |= _named(_HEAD, tied_head)
            if module in packed and module != name:
                tensors |= _named(module, packed[module])
            else:
                tensors[name] = file.get_tensor(name)
    return tensors


def _named(module: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{module}.{kind}": tensor.contiguous() for kind, tensor in tensors.items()}


def _config(path: pathlib.Path, recipe: Recipe, *, head: bool) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(path.read_text())
    fields["quantization_config"] = {
        "bits": recipe.scheme.bits,
        "group_size": recipe.scheme.group_size,
        "desc_act": recipe.desc_act,
        "sym": recipe.scheme.sym,
        "lm_head": head,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["folovllm"], "damp_percent": recipe.damping, "true_sequential": True},
    }
    if head:
        fields["tie_word_embeddings"] = False
    return fields

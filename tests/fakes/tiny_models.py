"""Tiny random models in Hugging Face's format, made with transformers, the oracle for numbers.

Two layers, hidden size 64, some kilobytes. Weights are drawn wide (standard deviation 0.15 instead of 0.02), so that
logits differ clearly and a wrong rotation or a swapped head shows.
"""

import json
import pathlib
from typing import Any

import safetensors.torch
import torch
import transformers

VOCAB_SIZE = 199
MAX_POSITIONS = 128

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}

_CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
FAMILIES = tuple(_CLASSES)


def make_model(
    folder: pathlib.Path,
    family: str,
    *,
    rope: str = "default",
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    seed: int = 0,
    **changes: Any,
) -> pathlib.Path:
    """Writes a random model to `folder` and returns it.

    Args:
        family: "llama", "qwen2" or "qwen3".
        rope: key of ROPES.
        dtype: type the weights are stored in.
        shard_size: largest file, as transformers spells it; small values give several shards and an index.
        changes: fields of config.json beside or instead of SIZES.
    """
    config_class, model_class = _CLASSES[family]
    fields = SIZES | {"rope_parameters": dict(ROPES[rope])} | changes
    if family == "qwen3" and "head_dim" not in changes:
        fields["head_dim"] = 16
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**fields))
        _randomize(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def load_reference(folder: pathlib.Path) -> Any:
    """transformers' own model of `folder`, float32, in evaluation mode, with its plainest attention."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return loaded.eval()


def edit_config(folder: pathlib.Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    """Changes fields of `folder`/config.json."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if name not in remove}))


def edit_tensors(folder: pathlib.Path, changes: dict[str, torch.Tensor], remove: tuple[str, ...] = ()) -> None:
    """Changes, adds and removes tensors of `folder`/model.safetensors."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path) | changes
    kept = {name: tensor for name, tensor in tensors.items() if name not in remove}
    safetensors.torch.save_file(kept, path, metadata={"format": "pt"})


def _randomize(model: Any) -> None:
    """Norm weights and biases start as ones and zeros: random ones show where they are mixed up or left out."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.data.normal_(0.0, 0.3)

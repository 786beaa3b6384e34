"""Writes a folder with Qwen3-0.6B's shape and random weights, for machines that reach no model hub.

    python -m bench.make_model FOLDER             # config.json and a tokenizer, for LLM(FOLDER, load_format="dummy")
    python -m bench.make_model FOLDER --weights   # and model.safetensors (1.2 GB, bf16)
    python -m bench.make_model FOLDER --tiny      # two narrow layers, to see on a CPU that a benchmark runs

The tokenizer has made-up words, as many as Qwen3's has tokens, so that a server has text to put together; prompts are
token ids all the same.
"""

import argparse
import json
import pathlib
from typing import Any

QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
    "bos_token_id": 151643,
}
TINY = QWEN3_0_6B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
NUM_WORDS = 151669
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tensor_shapes(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint."""
    hidden, head_dim, mlp = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_norm": (head_dim,),
            "self_attn.k_norm": (head_dim,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return shapes


def write_tokenizer(folder: pathlib.Path) -> None:
    """The 256 bytes, then words of four letters, every second one behind a blank."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    for number in range(NUM_WORDS - len(words)):
        letters = [_LETTERS[number // 26**place % 26] for place in range(4)]
        words.append(("Ġ" if number % 2 else "") + "".join(letters))
    backend = Tokenizer(models.BPE({word: token for token, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))


def write_weights(folder: pathlib.Path, config: dict[str, Any], seed: int) -> None:
    """Norms of ones, everything else normal with standard deviation 0.02."""
    import safetensors.torch  # torch takes seconds to load, and config.json alone needs none of it
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes({k: v for k, v in config.items() if isinstance(v, int)}).items():
        tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
        tensors[name] = tensor.to(torch.bfloat16)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--weights", action="store_true", help="write random weights too")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers instead of Qwen3-0.6B's shape")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    config = TINY if arguments.tiny else QWEN3_0_6B
    (arguments.folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(arguments.folder)
    if arguments.weights:
        write_weights(arguments.folder, config, arguments.seed)


if __name__ == "__main__":
    main()

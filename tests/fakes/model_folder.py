"""Writes a model folder without weights: a small config.json, and a tokenizer whose ids 0 to 255 are bytes."""

import json
import pathlib
from typing import Any

from tokenizers import AddedToken, pre_tokenizers

from tests.fakes.tokenizers_ import byte_level_backend

END_OF_TEXT, IM_START, IM_END = 256, 257, 258
NUM_IDS = 259
VOCAB_SIZE = 272  # more columns than ids, as real models have
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}quick{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": IM_END,
}


def ids_of(text: str) -> list[int]:
    """The tokenizer's ids of a text without special tokens: its bytes."""
    return list(text.encode())


def write_model_folder(
    folder: pathlib.Path,
    *,
    generation_config: dict[str, Any] | None = None,
    with_tokenizer: bool = True,
    **config: Any,
) -> pathlib.Path:
    """Makes `folder` and fills it; `config` replaces entries of config.json. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    if with_tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: pathlib.Path) -> None:
    """Adds the tokenizer to a folder: bytes, three special tokens and a chat template."""
    backend = byte_level_backend(byte_vocabulary())
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer_config = {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def byte_vocabulary() -> dict[str, int]:
    """GPT-2's spelling of each byte → the byte's value."""
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {}
    for code in range(0x800):  # UTF-8 of one and two bytes: every byte that occurs in shorter texts
        text = chr(code)
        for byte, character in zip(text.encode(), spelling.pre_tokenize_str(text)[0][0], strict=True):
            vocabulary[character] = byte
    used = set(vocabulary.values())
    rest = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(vocabulary))
    return vocabulary | dict(zip(rest, sorted(set(range(256)) - used), strict=True))

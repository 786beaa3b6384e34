"""What a model folder's config.json and generation_config.json say, checked and brought into one spelling.

What would change the network and is not supported (architecture, rope type, activation, window, quantization) is
refused here by name, so that nothing is accepted and ignored. Where config.json leaves a field out, the default is the
one that transformers has for the architecture, since the file was written with that default in mind.
"""

import pathlib
from typing import Any, Literal

import msgspec

from folovllm.common.errors import ModelError

Architecture = Literal["Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM"]
RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]
QuantizationMethod = Literal["gptq"]

SUPPORTED_ARCHITECTURES: tuple[Architecture, ...] = ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM")
SUPPORTED_ROPE_TYPES: tuple[RopeType, ...] = ("default", "linear", "dynamic", "llama3", "yarn")
SUPPORTED_DTYPES = ("bfloat16", "float16", "float32")
SUPPORTED_QUANTIZATION: tuple[QuantizationMethod, ...] = ("gptq",)

_DEFAULT_MAX_POSITIONS: dict[str, int] = {"LlamaForCausalLM": 2048}
_QWEN_MAX_POSITIONS = 32768
_QWEN3_HEAD_DIM = 128
_DEFAULT_THETA = 10000.0
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary position embedding; config.json spells it `rope_theta` + `rope_scaling` or `rope_parameters`.

    Attributes:
        rope_type: how frequencies are derived from theta; the fields below that it does not use keep their defaults.
        theta: base of the frequencies.
        factor: how many times the context is stretched (linear, dynamic, llama3, yarn).
        original_max_position_embeddings: context length before stretching (dynamic, llama3, yarn).
        low_freq_factor, high_freq_factor: bounds of the smooth region (llama3).
        attention_factor: multiplies cos and sin; None derives it from the factor (yarn).
        mscale, mscale_all_dim: alternative to `attention_factor` (yarn); 0 means not given.
        beta_fast, beta_slow: rotations that bound the ramp (yarn).
        truncate: whether the ramp's ends are rounded to whole dimensions (yarn).
    """

    rope_type: RopeType = "default"
    theta: float = _DEFAULT_THETA
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


class QuantizationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How a checkpoint's linear layers are stored.

    Attributes:
        method: key of the worker's registry.
        fields: what the file says, as spelled there; the method's own module checks it.
    """

    method: QuantizationMethod
    fields: dict[str, Any]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The network's shape and numbers, as config.json gives them.

    Attributes:
        architecture: class name of the network; key of the worker's registry.
        vocab_size: rows of the embedding, columns of the logits (may exceed the ids the tokenizer knows).
        head_dim: size of one attention head; not always hidden_size / num_attention_heads.
        max_position_embeddings: as in the file; see `default_max_model_len`.
        attention_bias: whether q, k, v and o projections have a bias (Llama, Qwen3; Qwen2 always has q, k, v only).
        mlp_bias: whether the MLP's projections have a bias (Llama).
        dtype: type the checkpoint says it is stored in; None where the file does not say.
        quantization: how its linear layers are quantized; None if they are not.
        eos_token_ids, bos_token_id: as in config.json; generation_config.json's count before these.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str | None = None
    quantization: QuantizationConfig | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def default_max_model_len(self) -> int:
        """Longest prompt + output where the user sets none, in tokens: the length the checkpoint was made for.

        Dynamic scaling stays at its original length here: up to it, no frequency is changed at all.
        """
        if self.rope.rope_type == "dynamic":
            return self.max_position_embeddings
        return self.longest_max_model_len

    @property
    def longest_max_model_len(self) -> int:
        """Largest `max_model_len` that makes sense, in tokens: context stretching counted in."""
        rope = self.rope
        if rope.rope_type in ("linear", "dynamic"):
            return int(self.max_position_embeddings * rope.factor)
        if rope.rope_type == "yarn":
            return max(self.max_position_embeddings, int(rope.original_max_position_embeddings * rope.factor))
        return self.max_position_embeddings


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling defaults of generation_config.json. None: the file does not set this one; explicit 0 and 1 are kept."""

    eos_token_id: int | list[int] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All end-of-sequence ids of the file; empty where it names none."""
        return _as_ids(self.eos_token_id)

    def sampling_defaults(self) -> dict[str, float]:
        """The sampling parameters that the file sets, by name (for the log line and for SamplingParams)."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        values: dict[str, float | None] = msgspec.structs.asdict(self)
        return {name: value for name in names if (value := values[name]) is not None}


class _RawConfig(msgspec.Struct, kw_only=True):
    """config.json's fields as spelled there; the decoder checks their types, None stands for absent or null."""

    architectures: list[str] | None = None
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int | None = None
    original_max_position_embeddings: int | None = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str | None = None
    torch_dtype: str | None = None
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int | None = None
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None


class _RawRope(msgspec.Struct, kw_only=True):
    """`rope_scaling` or `rope_parameters` as spelled in config.json."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool = True
    partial_rotary_factor: float | None = None


class _ArchitectureOnly(msgspec.Struct):
    """Read first, so that a foreign architecture is named before its unknown fields are complained about."""

    architectures: list[str] | None = None


def read_model_config(folder: pathlib.Path) -> ModelConfig:
    """Reads `folder`/config.json, and quantize_config.json where AutoGPTQ has put one beside it.

    Raises:
        ModelError: it is missing, is no valid JSON, lacks a field, or asks for something that is not supported.
    """
    path = folder / "config.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    try:
        architecture = _architecture(msgspec.json.decode(data, type=_ArchitectureOnly).architectures)
        raw = msgspec.json.decode(data, type=_RawConfig)
        return _checked_config(raw, architecture, raw.quantization_config or _quantize_config(folder))
    except (msgspec.DecodeError, ModelError) as error:
        raise ModelError(f"{path}: {error}") from error


def read_generation_defaults(folder: pathlib.Path) -> GenerationDefaults:
    """Reads `folder`/generation_config.json; without the file every default is None.

    Raises:
        ModelError: the file is there and cannot be understood.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults()
    try:
        return msgspec.json.decode(path.read_bytes(), type=GenerationDefaults)
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"{path}: {error}") from error


def end_of_sequence_ids(config: ModelConfig, defaults: GenerationDefaults) -> tuple[int, ...]:
    """The ids that end an answer: generation_config.json's where it names any, else config.json's."""
    return defaults.eos_token_ids or config.eos_token_ids


def _quantize_config(folder: pathlib.Path) -> dict[str, Any] | None:
    path = folder / "quantize_config.json"
    if not path.is_file():
        return None
    try:
        fields = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"{path}: {error}") from error
    return {"quant_method": "gptq"} | fields  # the file is older than the field


def _checked_config(raw: _RawConfig, architecture: Architecture, quantization: dict[str, Any] | None) -> ModelConfig:
    _refuse_unsupported(raw)
    max_positions = raw.max_position_embeddings
    if max_positions is None:
        max_positions = _DEFAULT_MAX_POSITIONS.get(architecture, _QWEN_MAX_POSITIONS)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=raw.vocab_size,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_hidden_layers=raw.num_hidden_layers,
        num_attention_heads=raw.num_attention_heads,
        num_key_value_heads=raw.num_attention_heads if raw.num_key_value_heads is None else raw.num_key_value_heads,
        head_dim=_head_dim(raw, architecture),
        rms_norm_eps=raw.rms_norm_eps,
        rope=_rope(raw, max_positions),
        max_position_embeddings=max_positions,
        tie_word_embeddings=raw.tie_word_embeddings,
        attention_bias=raw.attention_bias,
        mlp_bias=raw.mlp_bias,
        dtype=_dtype_name(raw.dtype or raw.torch_dtype),
        quantization=_quantization(quantization),
        eos_token_ids=_as_ids(raw.eos_token_id),
        bos_token_id=raw.bos_token_id,
    )
    _check_sizes(config)
    return config


def _architecture(names: list[str] | None) -> Architecture:
    supported = ", ".join(SUPPORTED_ARCHITECTURES)
    if not names:
        raise ModelError(f"'architectures' is missing; supported are {supported}")
    for name in SUPPORTED_ARCHITECTURES:
        if names[0] == name:
            return name
    raise ModelError(f"architecture {names[0]!r} is not supported; supported are {supported}")


def _refuse_unsupported(raw: _RawConfig) -> None:
    if raw.hidden_act not in (None, "silu"):
        raise ModelError(f"hidden_act {raw.hidden_act!r} is not supported; supported is 'silu'")
    window = _sliding_window_in_use(raw)
    if window:
        raise ModelError(f"sliding window attention ({window}) is not supported; supported is full attention only")


def _quantization(fields: dict[str, Any] | None) -> QuantizationConfig | None:
    if fields is None:
        return None
    found = fields.get("quant_method", "unknown")
    for method in SUPPORTED_QUANTIZATION:
        if found == method:
            return QuantizationConfig(method=method, fields=fields)
    raise ModelError(
        f"quantization {found!r} is not supported; supported are {', '.join(SUPPORTED_QUANTIZATION)} and unquantized "
        f"{_dtype_list()} weights"
    )


def _sliding_window_in_use(raw: _RawConfig) -> str:
    """What switches windows on for at least one layer, "" if nothing does."""
    if raw.layer_types is not None:
        other = sorted(set(raw.layer_types) - {"full_attention"})
        return f"layer_types has {', '.join(other)}" if other else ""
    if not raw.use_sliding_window or raw.sliding_window is None:
        return ""
    first = 28 if raw.max_window_layers is None else raw.max_window_layers
    if first >= raw.num_hidden_layers:
        return ""
    return f"use_sliding_window with sliding_window={raw.sliding_window} from layer {first} on"


def _head_dim(raw: _RawConfig, architecture: Architecture) -> int:
    if raw.head_dim is not None:
        return raw.head_dim
    if architecture == "Qwen3ForCausalLM":
        return _QWEN3_HEAD_DIM
    return raw.hidden_size // max(raw.num_attention_heads, 1)


def _rope(raw: _RawConfig, max_positions: int) -> RopeConfig:
    given = raw.rope_scaling or raw.rope_parameters or {}
    if any(isinstance(value, dict) for value in given.values()):
        raise ModelError("rope parameters per layer type are not supported; supported is one set for all layers")
    rope = msgspec.convert(given, _RawRope)
    rope_type = rope.rope_type or rope.type or "default"
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ModelError(f"rope type {rope_type!r} is not supported; supported are {', '.join(SUPPORTED_ROPE_TYPES)}")
    for partial in (rope.partial_rotary_factor, raw.partial_rotary_factor):
        if partial not in (None, 1.0):
            raise ModelError(f"partial_rotary_factor {partial} is not supported; supported is 1.0")
    original = raw.original_max_position_embeddings or rope.original_max_position_embeddings or max_positions
    if rope_type == "dynamic":
        original = max_positions
    return RopeConfig(
        rope_type=msgspec.convert(rope_type, RopeType),
        theta=_first(rope.rope_theta, raw.rope_theta, _DEFAULT_THETA),
        factor=_rope_factor(rope, rope_type, max_positions, original),
        original_max_position_embeddings=original,
        low_freq_factor=_needed(rope.low_freq_factor, rope_type, "low_freq_factor", only="llama3", default=1.0),
        high_freq_factor=_needed(rope.high_freq_factor, rope_type, "high_freq_factor", only="llama3", default=4.0),
        attention_factor=rope.attention_factor,
        mscale=rope.mscale or 0.0,
        mscale_all_dim=rope.mscale_all_dim or 0.0,
        beta_fast=rope.beta_fast or 32.0,
        beta_slow=rope.beta_slow or 1.0,
        truncate=rope.truncate,
    )


def _rope_factor(rope: _RawRope, rope_type: str, max_positions: int, original: int) -> float:
    if rope_type == "default":
        return 1.0
    factor = rope.factor
    if factor is None and rope_type == "yarn":
        factor = max_positions / original
    if factor is None or factor <= 0:
        raise ModelError(f"rope type {rope_type!r} needs a factor above 0, got {factor}")
    return factor


def _needed(value: float | None, rope_type: str, name: str, *, only: str, default: float) -> float:
    if rope_type != only:
        return default
    if value is None:
        raise ModelError(f"rope type {rope_type!r} needs {name}")
    return value


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _dtype_list() -> str:
    return ", ".join(SUPPORTED_DTYPES)


def _dtype_name(name: str | None) -> str | None:
    if name is None:
        return None
    short = name.removeprefix("torch.")
    if short not in SUPPORTED_DTYPES:
        raise ModelError(f"dtype {name!r} is not supported; supported are {_dtype_list()}")
    return short


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _check_sizes(config: ModelConfig) -> None:
    values: dict[str, Any] = msgspec.structs.asdict(config)
    for name in _SIZES:
        if values[name] < 1:
            raise ModelError(f"{name} must be at least 1, got {values[name]}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ModelError(
            f"num_attention_heads={config.num_attention_heads} is no multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise ModelError(f"head_dim={config.head_dim} is odd; rotary embedding needs pairs")

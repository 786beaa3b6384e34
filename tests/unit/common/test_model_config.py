import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from folovllm.common.errors import ModelError
from folovllm.common.model_config import (
    GenerationDefaults,
    ModelConfig,
    QuantizationConfig,
    RopeConfig,
    end_of_sequence_ids,
    read_generation_defaults,
    read_model_config,
)

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def read(folder: pathlib.Path, **changes: Any) -> ModelConfig:
    fields = {name: value for name, value in (BASE | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields))
    return read_model_config(folder)


def test_plain_fields(tmp_path: pathlib.Path) -> None:
    assert read(tmp_path) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope=RopeConfig(original_max_position_embeddings=512),
        max_position_embeddings=512,
        dtype="bfloat16",
        eos_token_ids=(2,),
        bos_token_id=1,
    )


def test_absent_fields_take_the_architectures_defaults(tmp_path: pathlib.Path) -> None:
    absent = {"num_key_value_heads": ..., "max_position_embeddings": ..., "rms_norm_eps": ..., "torch_dtype": ...}
    llama = read(tmp_path, **absent)
    assert (llama.num_key_value_heads, llama.max_position_embeddings, llama.rms_norm_eps) == (4, 2048, 1e-6)
    assert llama.dtype is None
    qwen = read(tmp_path, architectures=["Qwen3ForCausalLM"], **absent)
    assert (qwen.head_dim, qwen.max_position_embeddings) == (128, 32768)
    assert read(tmp_path, architectures=["Qwen2ForCausalLM"]).head_dim == 16


def test_L39_head_dim_is_read_not_derived(tmp_path: pathlib.Path) -> None:
    assert read(tmp_path, head_dim=32).head_dim == 32
    assert read(tmp_path, head_dim=None).head_dim == 16


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1000000},
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_theta": ..., "rope_scaling": {"rope_theta": 1e6, "type": "default"}},
        {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    ],
)
def test_L39_theta_in_every_spelling(tmp_path: pathlib.Path, spelling: dict[str, Any]) -> None:
    assert read(tmp_path, **spelling).rope.theta == 1e6


def test_L39_unknown_rope_type_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    for scaling in ({"rope_type": "longrope", "factor": 2.0}, {"type": "mrope"}):
        with pytest.raises(ModelError, match=r"'(longrope|mrope)' is not supported; supported are default, linear"):
            read(tmp_path, rope_scaling=scaling)


def test_rope_llama3(tmp_path: pathlib.Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = read(tmp_path, rope_scaling=scaling)
    assert config.rope == RopeConfig(rope_type="llama3", factor=8.0, original_max_position_embeddings=64)
    assert config.default_max_model_len == config.longest_max_model_len == 512
    del scaling["low_freq_factor"]
    with pytest.raises(ModelError, match="'llama3' needs low_freq_factor"):
        read(tmp_path, rope_scaling=scaling)


def test_rope_yarn(tmp_path: pathlib.Path) -> None:
    config = read(tmp_path, rope_scaling={"type": "yarn", "factor": 4.0, "beta_fast": 16, "truncate": False})
    assert config.rope == RopeConfig(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=512, beta_fast=16.0, truncate=False
    )
    assert config.default_max_model_len == 2048
    derived = read(tmp_path, rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 128})
    assert derived.rope.factor == 4.0 and derived.longest_max_model_len == 512


def test_original_length_beside_the_rope_parameters_counts_first(tmp_path: pathlib.Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
    config = read(tmp_path, rope_scaling=scaling, original_max_position_embeddings=256)
    assert config.rope.original_max_position_embeddings == 256


def test_lengths_of_linear_and_dynamic(tmp_path: pathlib.Path) -> None:
    linear = read(tmp_path, rope_scaling={"type": "linear", "factor": 2})
    assert (linear.default_max_model_len, linear.longest_max_model_len) == (1024, 1024)
    dynamic = read(tmp_path, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert (dynamic.default_max_model_len, dynamic.longest_max_model_len) == (512, 1024)
    with pytest.raises(ModelError, match="'linear' needs a factor above 0, got None"):
        read(tmp_path, rope_scaling={"type": "linear"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, r"'MixtralForCausalLM' is not supported; supported are Qwen3"),
        ({"architectures": ...}, "'architectures' is missing"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported is 'silu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization 'awq' is not supported; supported are gptq"),
        ({"quantization_config": {"bits": 4}}, "quantization 'unknown' is not supported"),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding window attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "per layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 is no multiple"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ({"vocab_size": ...}, "vocab_size"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: pathlib.Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read(tmp_path, **changes)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_quantization_in_either_file(tmp_path: pathlib.Path) -> None:
    fields = {"bits": 4, "group_size": 128}
    (tmp_path / "quantize_config.json").write_text(json.dumps(fields))
    assert read(tmp_path).quantization == QuantizationConfig(method="gptq", fields={"quant_method": "gptq"} | fields)
    own = {"quant_method": "gptq", "bits": 8}
    assert read(tmp_path, quantization_config=own).quantization == QuantizationConfig(method="gptq", fields=own)
    (tmp_path / "quantize_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"quantize_config\.json"):
        read(tmp_path)


def test_windows_that_touch_no_layer_are_accepted(tmp_path: pathlib.Path) -> None:
    unused = {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0}
    assert read(tmp_path, **unused).num_hidden_layers == 2
    beyond = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}
    assert read(tmp_path, **beyond, layer_types=["full_attention"] * 2).num_hidden_layers == 2
    assert read(tmp_path, **beyond).num_hidden_layers == 2


def test_missing_or_broken_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read .*config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: Input data was truncated"):
        read_model_config(tmp_path)


def test_dtype_new_spelling_counts_first(tmp_path: pathlib.Path) -> None:
    assert read(tmp_path, dtype="float16").dtype == "float16"
    assert read(tmp_path, torch_dtype="torch.float32").dtype == "float32"


def test_generation_defaults_keep_what_the_file_sets(tmp_path: pathlib.Path) -> None:
    assert read_generation_defaults(tmp_path) == GenerationDefaults()
    text = {"eos_token_id": [151645, 151643], "temperature": 0, "top_k": 1, "do_sample": True, "top_p": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(text))
    defaults = read_generation_defaults(tmp_path)
    assert defaults.sampling_defaults() == {"temperature": 0.0, "top_k": 1}
    assert defaults.eos_token_ids == (151645, 151643)
    (tmp_path / "generation_config.json").write_text('{"top_k": "x"}')
    with pytest.raises(ModelError, match=r"generation_config\.json.*top_k"):
        read_generation_defaults(tmp_path)


def test_L08_generation_configs_end_ids_count_before_configs(tmp_path: pathlib.Path) -> None:
    config = read(tmp_path, eos_token_id=2)
    assert end_of_sequence_ids(config, GenerationDefaults(eos_token_id=[7, 8])) == (7, 8)
    assert end_of_sequence_ids(config, GenerationDefaults()) == (2,)
    assert end_of_sequence_ids(read(tmp_path, eos_token_id=[2, 3]), GenerationDefaults()) == (2, 3)
    assert end_of_sequence_ids(read(tmp_path, eos_token_id=...), GenerationDefaults()) == ()


def test_module_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, folovllm.common.model_config; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

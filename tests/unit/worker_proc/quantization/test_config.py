from typing import Any

import pytest

from folovllm.common.errors import ModelError
from folovllm.worker_proc.quantization.config import GPTQConfig, Scheme, read_gptq_config

AUTOGPTQ = {
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.1,
    "desc_act": True,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
}
OPTIMUM = {
    "bits": 4,
    "dataset": "c4",
    "group_size": -1,
    "damp_percent": 0.1,
    "desc_act": False,
    "sym": False,
    "quant_method": "gptq",
    "use_exllama": True,
    "modules_in_block_to_quantize": [["self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]],
}
GPTQMODEL = {
    "bits": 4,
    "group_size": 64,
    "desc_act": False,
    "lm_head": True,
    "quant_method": "gptq",
    "method": "gptq",
    "format": "gptq_v2",
    "checkpoint_format": "gptq_v2",
    "pack_dtype": "int32",
    "sym": True,
    "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05, "true_sequential": True},
    "dynamic": {
        r"-:model\.layers\.0\..*": {},
        r"+:.*\.1\..*gate.*": {"bits": 8, "group_size": 32},
        r".*o_proj": {"sym": False, "desc_act": True},
    },
}


def read(**changes: Any) -> GPTQConfig:
    return read_gptq_config({name: value for name, value in (OPTIMUM | changes).items() if value is not ...})


def test_what_three_programs_write() -> None:
    old = read_gptq_config(AUTOGPTQ)
    assert old.scheme == Scheme(4, 128, sym=True)
    assert old.desc_act and old.zeros_minus_one and not old.borrows and not old.lm_head
    assert old.scheme_of("model.layers.7.mlp.up_proj") == old.scheme and old.scheme_of("lm_head") is None
    new = read_gptq_config(GPTQMODEL)
    assert not new.zeros_minus_one and new.borrows and not new.desc_act
    assert new.scheme_of("lm_head") == Scheme(4, 64, sym=True)


def test_exceptions_by_pattern_the_first_match_counts() -> None:
    config = read_gptq_config(GPTQMODEL)
    assert config.scheme_of("model.layers.0.mlp.gate_proj") is None
    assert config.scheme_of("model.layers.1.mlp.gate_proj") == Scheme(8, 32, sym=True)
    assert config.scheme_of("model.layers.1.self_attn.o_proj") == Scheme(4, 64, sym=False)
    assert config.scheme_of("model.layers.10.mlp.up_proj") == config.scheme


def test_only_the_named_modules_of_a_block() -> None:
    config = read_gptq_config(OPTIMUM)
    assert config.scheme_of("model.layers.3.self_attn.k_proj") == Scheme(4, -1, sym=False)
    assert config.scheme_of("model.layers.3.mlp.down_proj") is not None
    assert config.scheme_of("model.layers.3.self_attn.q_proj") is None
    flat = read(modules_in_block_to_quantize=["mlp.down_proj"])
    assert flat.scheme_of("model.layers.0.mlp.down_proj") is not None
    assert flat.scheme_of("model.layers.0.self_attn.k_proj") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 2}, "GPTQ with 2 bits is not supported; supported are 4 and 8"),
        ({"bits": 3}, "GPTQ with 3 bits is not supported"),
        ({"bits": ...}, "bits"),
        ({"bits": "four"}, "bits"),
        ({"group_size": 8}, "group_size 8 is not supported; supported are 16 to 1024, and -1"),
        ({"group_size": 2048}, "group_size 2048 is not supported"),
        ({"group_size": 36}, "group_size 36 is no multiple of 8"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported; supported are gptq, gptq_v2"),
        ({"is_marlin_format": True}, "'marlin' is not supported"),
        ({"format": "bitblas"}, "'bitblas' is not supported"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16' is not supported"),
        ({"activation": {"bits": 8}}, "activation .* is not supported"),
        ({"rotation": "hadamard"}, "rotation 'hadamard' is not supported"),
        ({"dynamic": {"+:.*up": {"bits": 3}}}, r"3 bits for '\+:\.\*up' is not supported"),
        ({"dynamic": {"+:.*up": {"pack_dtype": "int8"}}}, "pack_dtype 'int8' for"),
        ({"dynamic": {"-:(": {}}}, r"dynamic rule '-:\('"),
        ({"dynamic": {"x": {"bits": "y"}}}, "dynamic rule 'x'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(**changes)

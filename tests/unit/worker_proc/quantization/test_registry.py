import pathlib

import pytest
import torch

from folovllm.common.errors import ModelError
from folovllm.common.model_config import SUPPORTED_QUANTIZATION, read_model_config
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.layers.linear import DenseLinears
from folovllm.worker_proc.quantization.gptq import GPTQLinears
from folovllm.worker_proc.quantization.registry import METHODS, linear_maker, type_around
from tests.fakes.gptq_models import Format, make_gptq_model
from tests.fakes.tiny_models import edit_config

PLACEMENT = Placement(torch.device("cpu"), torch.float32)


def test_every_method_that_a_configuration_may_name_has_a_maker(tmp_path: pathlib.Path) -> None:
    assert set(METHODS) == set(SUPPORTED_QUANTIZATION)
    quantized, plain = make_gptq_model(tmp_path, "llama", Format())
    assert isinstance(linear_maker(read_model_config(plain), PLACEMENT, plain), DenseLinears)
    assert isinstance(linear_maker(read_model_config(quantized), PLACEMENT, quantized), GPTQLinears)
    edit_config(quantized, quantization_config=Format().config(bits=3))
    with pytest.raises(ModelError, match="3 bits"):
        linear_maker(read_model_config(quantized), PLACEMENT, quantized)


def test_a_cpu_computes_in_bfloat16_around_quantized_weights(tmp_path: pathlib.Path) -> None:
    quantized, plain = (read_model_config(folder) for folder in make_gptq_model(tmp_path, "llama", Format()))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert type_around(quantized, cpu, "float16") == "bfloat16"
    assert type_around(quantized, cuda, "float16") == type_around(plain, cpu, "float16") == "float16"
    assert type_around(quantized, cpu, "float32") == "float32" and type_around(quantized, cpu, None) is None

"""Which maker of linear layers serves which quantization method. Another method is another file and a line here."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from folovllm.common.model_config import ModelConfig, QuantizationMethod
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.layers.linear import DenseLinears, LinearMaker
from folovllm.worker_proc.quantization.config import read_gptq_config
from folovllm.worker_proc.quantization.gptq import GPTQLinears
from folovllm.worker_proc.weights import stored_shapes

Shapes = Mapping[str, tuple[int, ...]]  # of a checkpoint's tensors, by name


def _gptq(fields: Mapping[str, Any], placement: Placement, stored: Shapes | None) -> LinearMaker:
    return GPTQLinears(read_gptq_config(fields), placement, stored)


METHODS: dict[QuantizationMethod, Callable[[Mapping[str, Any], Placement, Shapes | None], LinearMaker]] = {
    "gptq": _gptq
}


def linear_maker(config: ModelConfig, placement: Placement, folder: pathlib.Path | None) -> LinearMaker:
    """The maker for a model's checkpoint in `folder`; None: there are no files, weights will be random.

    Raises:
        ModelError: the quantization's fields make no sense or ask for what is not supported.
    """
    if config.quantization is None:
        return DenseLinears(placement)
    stored = None if folder is None else stored_shapes(folder)
    return METHODS[config.quantization.method](config.quantization.fields, placement, stored)


def type_around(config: ModelConfig, device: torch.device, stored: str | None) -> str | None:
    """The type of what is not quantized, and of activations, where `stored` is what the checkpoint says.

    GPTQ checkpoints mostly say float16, since the kernels of their time were written for it. A CPU computes in bfloat16
    several times faster, and 4-bit numbers lose nothing by it.
    """
    if config.quantization is not None and device.type == "cpu" and stored == "float16":
        return "bfloat16"
    return stored

"""Which maker of linear layers serves which quantization method. Another method is another file and a line here."""

import functools
import importlib.util
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from folovllm.common.config import use_cpu_kernels
from folovllm.common.model_config import ModelConfig, QuantizationMethod
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kernels.cpu.background import Compiler
from folovllm.worker_proc.layers.int4_layout import Int4Layout
from folovllm.worker_proc.layers.linear import DenseLinears, LinearMaker, can_pack
from folovllm.worker_proc.quantization.config import WHOLE_INPUT, Scheme, read_gptq_config
from folovllm.worker_proc.quantization.gptq import INT4_BITS, GPTQLinears, Int4Maker
from folovllm.worker_proc.weights import stored_shapes

if TYPE_CHECKING:
    from folovllm.worker_proc.kernels.cpu.team import Team
    from folovllm.worker_proc.layers.int4_linear import Int4Kernels

Shapes = Mapping[str, tuple[int, ...]]  # of a checkpoint's tensors, by name


def _gptq(fields: Mapping[str, Any], placement: Placement, stored: Shapes | None) -> LinearMaker:
    config = read_gptq_config(fields)
    return GPTQLinears(config, placement, stored, _int4_maker(placement, config.scheme))


def _int4_maker(placement: Placement, scheme: Scheme) -> Callable[[], Int4Maker | None]:
    """What makes layers of 4-bit weights: with Triton's kernels, or with compiled ones on a CPU; None elsewhere."""
    if not placement.use_triton:
        return _compiled_int4_maker(placement, scheme)
    if placement.dtype == torch.float32:
        return lambda: None
    from folovllm.worker_proc.layers.int4_triton_linear import Int4Scratch, words_linear

    make = functools.partial(words_linear, scratch=Int4Scratch(placement))
    return lambda: make


def _compiled_int4_maker(placement: Placement, scheme: Scheme) -> Callable[[], Int4Maker | None]:
    """Begins to compile what computes with 4-bit weights, while they are read; what is returned waits for it."""
    bfloat16 = torch.empty(0, dtype=placement.dtype, device=placement.device)
    if not can_pack(bfloat16) or not use_cpu_kernels() or importlib.util.find_spec("llvmlite") is None:
        return lambda: None
    compiler = Compiler()

    def make(team: "Team") -> "Int4Kernels":
        from folovllm.worker_proc.layers.int4_linear import Int4Kernels

        kernels = Int4Kernels(team, compiler.cache)
        if scheme.bits == INT4_BITS and scheme.group_size != WHOLE_INPUT:
            kernels.product(Int4Layout(scheme.group_size, not scheme.sym))
        return kernels

    later = compiler.begin("products with 4-bit weights", make)

    def wait() -> Int4Maker | None:
        from folovllm.worker_proc.layers.int4_linear import packed_linear

        kernels = later.wait()
        return None if kernels is None else functools.partial(packed_linear, kernels=kernels)

    return wait


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

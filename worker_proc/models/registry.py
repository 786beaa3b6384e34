"""Which class implements which architecture, and what the worker expects of it."""

from collections.abc import Iterator
from typing import Protocol

import torch

from folovllm.common.model_config import Architecture, ModelConfig
from folovllm.worker_proc.attention.backend import AttentionStep
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.layers.linear import DenseLinears, LinearMaker
from folovllm.worker_proc.layers.parts import NetworkParts
from folovllm.worker_proc.models.llama import LlamaForCausalLM
from folovllm.worker_proc.models.qwen2 import Qwen2ForCausalLM
from folovllm.worker_proc.models.qwen3 import Qwen3ForCausalLM


class CausalLM(Protocol):
    """A network that predicts the next token. Inference only: call it under `torch.inference_mode()`."""

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionStep) -> torch.Tensor:
        """Token ids [T] and positions [T] (int64), flat over the step's requests → hidden states [T, hidden_size]."""
        ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [R, hidden_size] of tokens to sample after → logits [R, vocab_size] in the weights' type."""
        ...

    def checkpoint_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor a checkpoint must hold: its name, and the view that it is copied into."""
        ...

    def spare_tensors(self) -> frozenset[str]:
        """Names a checkpoint may hold beside these, which do not count."""
        ...

    def finish_loading(self) -> None:
        """To be called once all tensors are filled."""
        ...

    def parts(self) -> NetworkParts:
        """What it is made of, for code that computes whole steps."""
        ...


class CausalLMClass(Protocol):
    """What makes a CausalLM."""

    def __call__(
        self, config: ModelConfig, placement: Placement, max_model_len: int, linears: LinearMaker
    ) -> CausalLM: ...


MODELS: dict[Architecture, CausalLMClass] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def build_model(
    config: ModelConfig, placement: Placement, max_model_len: int, linears: LinearMaker | None = None
) -> CausalLM:
    """The network with its memory allocated and its weights not yet filled (see `weights`).

    `linears` makes its linear layers: dense ones by default, a quantization method's for a checkpoint that it wrote.
    """
    return MODELS[config.architecture](config, placement, max_model_len, linears or DenseLinears(placement))

"""What a network is made of, for code that computes all of it in one go: told by each network, top to bottom."""

import dataclasses
from collections.abc import Sequence

import torch

from folovllm.worker_proc.layers.linear import LinearLayer
from folovllm.worker_proc.layers.norm import HeadNorm, RMSNorm
from folovllm.worker_proc.layers.rotary import RotaryTable


@dataclasses.dataclass(frozen=True, slots=True)
class LayerParts:
    """A decoder layer: normed, q k v, heads normed or not, rotated, attention, o, added; normed, gate up, SiLU · up,
    down, added.
    """

    input_norm: RMSNorm
    qkv: LinearLayer
    head_norm: HeadNorm | None
    out: LinearLayer
    post_norm: RMSNorm
    gate_up: LinearLayer
    down: LinearLayer


@dataclasses.dataclass(frozen=True, slots=True)
class NetworkParts:
    """Embedding [vocab, hidden], layers, the last norm, and what makes logits of it."""

    embedding: torch.Tensor
    rotary: RotaryTable
    layers: Sequence[LayerParts]
    norm: RMSNorm
    head: LinearLayer

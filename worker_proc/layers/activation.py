"""The gated activation of the MLP."""

import torch
import torch.nn.functional as F


def silu_and_mul(gate_and_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) · up`: [T, 2 · intermediate], gate first → [T, intermediate]."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)

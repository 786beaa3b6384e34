"""Rotary position embedding: one table of cosines and sines per model, and the rotation of query and key heads.

The table is a function of position alone, so a token's rotation never depends on the batch it is computed in, on
chunking, or on being computed again after preemption. That matters for dynamic NTK scaling only, where transformers
derives the frequencies from the longest sequence seen so far. Here they are derived once, from the larger of the
original context and the configured `max_model_len`:

* `max_model_len` ≤ original context (the default): nothing is scaled; equal to transformers for every sequence.
* `max_model_len` > original context: one set of frequencies, those transformers uses for a prompt of `max_model_len`
  tokens. Shorter sequences then differ from transformers, but queries and keys always agree with each other; with
  transformers' rule, keys cached early keep the frequencies of an earlier, shorter length.

Sources: linear, dynamic and YaRN scaling as in transformers' modeling_rope_utils (YaRN: arXiv 2309.00071); llama3 as in
Meta's llama-models.
"""

import math

import torch

from folovllm.common.model_config import RopeConfig
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.layers.norm import HeadNorm


class RotaryTable:
    """Cosines and sines of all positions.

    Attributes:
        cos: [max_model_len, 1, head_dim], both halves of the head the same.
        sin: [max_model_len, 1, head_dim], first half negated, so that a rotation is
            `x · cos + roll(x, head_dim / 2) · sin`.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, max_model_len: int, placement: Placement) -> None:
        frequencies, scale = rope_frequencies(rope, head_dim, max_model_len)
        angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), frequencies)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self.cos = torch.cat((cos, cos), dim=-1).unsqueeze(1).to(placement.device, placement.dtype)
        self.sin = torch.cat((-sin, sin), dim=-1).unsqueeze(1).to(placement.device, placement.dtype)

    def rows(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The cosines and sines, each [T, 1, head_dim], of `positions` [T]; taken once a step for all layers."""
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)


class HeadRotation:
    """Rotates query and key heads in place; where the model has a norm for heads, each is normed first."""

    def __init__(self, placement: Placement, norm: HeadNorm | None = None) -> None:
        self._norm = norm
        self._use_triton = placement.use_triton
        self._dependent = placement.dependent_launch

    def __call__(self, heads: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> None:
        """`heads`: [T, query heads + key heads, head_dim]; `rotation`: cosines and sines, see `RotaryTable.rows`."""
        norm = self._norm
        if self._use_triton:
            from folovllm.worker_proc.kernels.triton.heads import rotate_heads

            weight, eps = (norm.weight, norm.eps) if norm else (None, 0.0)
            rotate_heads(heads, weight, *rotation, eps, dependent=self._dependent)
        else:
            rotate_into(heads, norm(heads) if norm else heads, *rotation)


def rotate_into(out: torch.Tensor, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Writes the rotated `heads` [T, H, head_dim] to `out` (same shape; may be `heads` itself)."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    torch.mul(heads, cos, out=out)
    out.addcmul_(swapped, sin)


def rope_frequencies(rope: RopeConfig, head_dim: int, max_model_len: int) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair of dimensions, float32 [head_dim / 2], and the factor on cosines and sines."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    if rope.rope_type == "default":
        return 1.0 / rope.theta**exponents, 1.0
    if rope.rope_type == "linear":
        return 1.0 / rope.theta**exponents / rope.factor, 1.0
    if rope.rope_type == "dynamic":
        return 1.0 / _dynamic_theta(rope, head_dim, max_model_len) ** exponents, 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, 1.0 / rope.theta**exponents), 1.0
    return _yarn(rope, rope.theta**exponents, head_dim), _yarn_scale(rope)


def _dynamic_theta(rope: RopeConfig, head_dim: int, max_model_len: int) -> float:
    original = rope.original_max_position_embeddings
    stretch = rope.factor * max(max_model_len, original) / original - (rope.factor - 1)
    return float(rope.theta * stretch ** (head_dim / (head_dim - 2)))


def _llama3(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Long waves are stretched, short ones kept, those between blended."""
    wave_length = 2 * math.pi / frequencies
    turns = rope.original_max_position_embeddings / wave_length
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1 - keep) * frequencies / rope.factor + keep * frequencies


def _yarn(rope: RopeConfig, periods: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Dimensions that turn often within the original context keep their frequency, slow ones are stretched."""
    low = _yarn_dimension(rope, rope.beta_fast, head_dim)
    high = _yarn_dimension(rope, rope.beta_slow, head_dim)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001  # no division by zero where the ramp has no width
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return stretched / (rope.factor * periods) + (1 - stretched) / periods


def _yarn_dimension(rope: RopeConfig, rotations: float, head_dim: int) -> float:
    """The (fractional) dimension that makes `rotations` turns within the original context."""
    turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
    return head_dim * math.log(turns) / (2 * math.log(rope.theta))


def _yarn_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_mscale(rope.factor, rope.mscale) / _yarn_mscale(rope.factor, rope.mscale_all_dim)
    return _yarn_mscale(rope.factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

"""The FP8 KV cache: what is stored, and how its scales are found.

A stored number is k / scale as float8_e4m3fn (1 sign, 4 exponent, 3 mantissa bits; largest 448): half the bytes of
bfloat16, rounded by up to 1/16 of itself. One scale belongs to a layer, to keys or values, and to a KV head, so that no
head is rounded for another one's size. Every backend stores first and attends to what was stored, the step's own tokens
included: so a chunk equals a whole prompt, and a prefix that is found one that is computed, as closely as without FP8.

Scales are found once, at the start, by one pass over made-up text (`calibrate`), and never change: they are a function
of the weights alone, so that a worker that takes another's place stores the same numbers. What is larger than all that
the pass saw is clamped; with `_MARGIN` that takes twice the largest. The margin costs nothing: a float's rounding is
relative, down to 2⁻⁶ · scale, 1/28,000 of the largest. Scales that a checkpoint brings (`k_scale`, `v_scale`) are one
for all heads of a layer, and are not read.
"""

from typing import Final

import torch
import torch.nn.functional as F

from folovllm.common.model_config import ModelConfig
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.models.registry import CausalLM

LARGEST: Final = 448.0  # of float8_e4m3fn
_MARGIN: Final = 2.0
_NUM_TOKENS: Final = 512
_SEED: Final = 0


def quantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`values` / `scales` (which broadcasts), clamped, as float8_e4m3fn; rounded to the nearest, ties to even."""
    return (values.float() / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def dequantize(stored: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers that `stored` stands for, float32."""
    return stored.float() * scales


def calibrate(
    model: CausalLM, config: ModelConfig, placement: Placement, max_tokens: int, num_valid_token_ids: int
) -> torch.Tensor:
    """Scales [num_layers, 2, num_kv_heads], float32, by one pass over random tokens, always the same ones.

    Args:
        model: with its weights.
        config, placement: of the model.
        max_tokens: the pass has no more than that.
        num_valid_token_ids: ids are below.
    """
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(num_valid_token_ids, (min(_NUM_TOKENS, max_tokens),), generator=generator)
    largest = LargestHeads(config, placement.device)
    model.forward(ids.to(placement.device), torch.arange(len(ids), device=placement.device), largest)
    return largest.scales()


class LargestHeads:
    """An attention step (`attention.backend.AttentionStep`) of one prompt that keeps no cache, but the largest numbers.

    Attributes:
        largest: float32 [num_layers, 2 · num_kv_heads]; the largest absolute number of each K head, then V head.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._num_kv_heads = config.num_key_value_heads
        self.largest = torch.zeros(config.num_hidden_layers, 2 * self._num_kv_heads, device=device)

    def attend(self, layer: int, query: torch.Tensor, key_and_value: torch.Tensor) -> torch.Tensor:
        self.largest[layer] = key_and_value.abs().amax(dim=(0, 2)).float()
        key, value = key_and_value.transpose(0, 1).unsqueeze(0).split(self._num_kv_heads, dim=1)
        queries = query.transpose(0, 1).unsqueeze(0)
        output = F.scaled_dot_product_attention(queries, key, value, is_causal=True, enable_gqa=True)
        return output[0].transpose(0, 1).flatten(1)

    def scales(self) -> torch.Tensor:
        """[num_layers, 2, num_kv_heads]; 1 for heads that were 0 throughout, or overflowed."""
        scales = self.largest * (_MARGIN / LARGEST)
        usable = scales.isfinite() & (scales > 0)
        return torch.where(usable, scales, 1.0).view(-1, 2, self._num_kv_heads)

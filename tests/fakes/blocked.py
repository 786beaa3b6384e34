"""Weights in blocks, packed by hand: what oneDNN does on some processors, here on all of them and for both types."""

import torch

from folovllm.worker_proc.layers.blocked import BlockedWeight, BlockLayout, look_into
from folovllm.worker_proc.layers.linear import Linear, can_pack
from folovllm.worker_proc.layers.parts import NetworkParts

INPUT_MULTIPLE = 32


def packs_in_blocks() -> bool:
    """Not without bf16 products (AVX2); with plain AVX-512 oneDNN only turns the weight over."""
    weight = torch.randn(320, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    return can_pack(weight) and look_into(torch.ops.mkldnn._reorder_linear_weight(weight, 16), weight) is not None


def pack_by_hand(weight: torch.Tensor, width: int, group: int) -> tuple[BlockedWeight, torch.Tensor]:
    """The description, and the memory that it is about (to be kept)."""
    out_features, in_features = weight.shape
    padded_out, padded_in = -(-out_features // width) * width, -(-in_features // INPUT_MULTIPLE) * INPUT_MULTIPLE
    padded = weight.new_zeros(padded_out, padded_in)
    padded[:out_features, :in_features] = weight
    memory = padded.view(-1, width, padded_in // group, group).permute(0, 2, 1, 3).contiguous()
    layout = BlockLayout(width, group, str(weight.dtype).removeprefix("torch."))
    return BlockedWeight(memory.data_ptr(), out_features, in_features, padded_in, layout), memory


def block_network(parts: NetworkParts, weights: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    """Gives every linear layer its description, whatever the processor; returns the memory, to be kept.

    `weights`: the row-major weights by the layers' `id`, taken before they were packed.
    """
    memories = []
    for layer in linears_of(parts):
        layer.blocked, memory = pack_by_hand(weights[id(layer)], 32, 2)
        memories.append(memory)
    return memories


def linears_of(parts: NetworkParts) -> list[Linear]:
    layers = [linear for layer in parts.layers for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    found = [linear for linear in (*layers, parts.head) if isinstance(linear, Linear)]
    assert len(found) == len(layers) + 1
    return found

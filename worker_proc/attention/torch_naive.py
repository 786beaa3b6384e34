"""The reference: one request after another, float32 scores and softmax, every step spelled out. Slow on purpose."""

import math

import torch

from folovllm.worker_proc.attention.backend import AttentionMetadata
from folovllm.worker_proc.fp8_cache import dequantize, quantize
from folovllm.worker_proc.kv_tensors import KVTensors


class TorchNaiveBackend:
    """Reads as the definition of attention over a paged cache; the other backends are compared with it."""

    name = "torch_naive"

    def begin_step(self, kv: KVTensors, metadata: AttentionMetadata) -> "TorchNaiveStep":
        return TorchNaiveStep(kv, metadata)


class TorchNaiveStep:
    """See `backend.AttentionStep`."""

    def __init__(self, kv: KVTensors, metadata: AttentionMetadata) -> None:
        self._kv = kv
        self._metadata = metadata

    def attend(self, layer: int, query: torch.Tensor, key_and_value: torch.Tensor) -> torch.Tensor:
        metadata, kv = self._metadata, self._kv
        blocks, offsets = metadata.slot_mapping // kv.block_size, metadata.slot_mapping % kv.block_size
        heads = key_and_value.unflatten(1, (2, kv.num_kv_heads)).permute(1, 2, 0, 3)  # [2, Hkv, T, D]
        scales = kv.layer_scales(layer)
        if scales is None:
            kv.layer(layer)[:, :, blocks, offsets] = heads
        else:
            kv.layer(layer)[:, :, blocks, offsets] = quantize(heads, scales[:, :, None, None])
        outputs = []
        start = 0
        for request, (query_len, seq_len) in enumerate(zip(metadata.query_lens, metadata.seq_lens, strict=True)):
            key, value = self._context(layer, request, seq_len)
            outputs.append(_attend_one(query[start : start + query_len], key, value))
            start += query_len
        return torch.cat(outputs).flatten(1)

    def _context(self, layer: int, request: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one request, each [Hkv, seq_len, D]."""
        num_blocks = -(-seq_len // self._kv.block_size)
        blocks = self._metadata.block_table[request, :num_blocks]
        cached = self._kv.layer(layer)[:, :, blocks].flatten(2, 3)[:, :, :seq_len]  # [2, Hkv, seq_len, D]
        scales = self._kv.layer_scales(layer)
        keys, values = cached if scales is None else dequantize(cached, scales[:, :, None, None])
        return keys, values


def _attend_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """query [n, Hq, D], the last n positions of key and value [Hkv, S, D] → [n, Hq, D]."""
    num_queries, num_q_heads, head_dim = query.shape
    num_kv_heads, seq_len, _ = key.shape
    group = num_q_heads // num_kv_heads
    key = key.repeat_interleave(group, dim=0).float()
    value = value.repeat_interleave(group, dim=0).float()
    scores = query.transpose(0, 1).float() @ key.transpose(1, 2) / math.sqrt(head_dim)  # [Hq, n, S]
    positions = torch.arange(seq_len, device=query.device)
    future = positions[None, :] > positions[seq_len - num_queries :, None]
    weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    return (weights @ value).transpose(0, 1).to(query.dtype)

"""The KV cache: keys and values of all layers in fixed-size blocks, allocated once.

Layout: `data` [num_layers, 2, num_kv_heads, num_blocks, block_size, head_dim], keys before values. A layer's blocks of
one head are rows of block_size · head_dim contiguous numbers, so a batch's keys *and* values are fetched by one row
gather, and come out as [heads · requests, tokens, head_dim], the shape of a batched product. Compared with
`[num_blocks, block_size, num_kv_heads, head_dim]`, which gathers as fast but leaves keys strided, so that
scaled_dot_product_attention is the fastest way on, attention of 16 requests × 256 tokens takes 0.24 instead of 0.38 ms
a layer (2 cores, bf16, 9 query and 3 KV heads of 64).
"""

import math
import mmap

import torch

from folovllm.common.model_config import ModelConfig
from folovllm.worker_proc.device import Placement

NULL_BLOCK = 0  # never written to, so always zero: what block tables are padded with


class KVTensors:
    """Key and value storage.

    Attributes:
        data: the whole cache, see the module's head. Zeroed: a masked position's value still meets a weight of 0, and
            0 · NaN from uninitialised memory would be NaN.
        num_blocks, block_size: blocks (the null block 0 included), and tokens in each.
        num_kv_heads, head_dim: as in the model.
        scales: float32 [num_layers, 2, num_kv_heads], what stored numbers are to be multiplied by; None where the
            cache is of the model's own type.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        placement: Placement,
        scales: torch.Tensor | None = None,
    ) -> None:
        """`scales`: of an FP8 cache; 1 throughout if there are none."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        shape = (config.num_hidden_layers, 2, self.num_kv_heads, num_blocks, block_size, self.head_dim)
        self.data = _zeros(shape, placement)
        self.scales: torch.Tensor | None = None
        self._whole = self.data  # to copy and to zero
        if placement.fp8_cache:
            self.scales = torch.ones(shape[:3], device=placement.device) if scales is None else scales.contiguous()
            self._whole = self.data.view(torch.uint8)  # torch moves floats of 8 bits by few operators
        rows = 2 * self.num_kv_heads * num_blocks
        # Views made once: each costs a microsecond, three of them in every layer of every step.
        self._block_rows = [layer.view(rows, block_size * self.head_dim) for layer in self.data]
        self._token_rows = [layer.view(rows * block_size, self.head_dim) for layer in self.data]

    def layer(self, index: int) -> torch.Tensor:
        """[2, num_kv_heads, num_blocks, block_size, head_dim] of one layer."""
        return self.data[index]

    def layer_scales(self, index: int) -> torch.Tensor | None:
        """[2, num_kv_heads] of one layer, contiguous."""
        return None if self.scales is None else self.scales[index]

    def block_rows(self, layer: int) -> torch.Tensor:
        """[2 · num_kv_heads · num_blocks, block_size · head_dim]; row (kind · heads + head) · num_blocks + block."""
        rows: torch.Tensor = self._block_rows[layer]
        return rows

    def token_rows(self, layer: int) -> torch.Tensor:
        """[2 · num_kv_heads · num_blocks · block_size, head_dim]; rows in the order of `layer`."""
        rows: torch.Tensor = self._token_rows[layer]
        return rows

    def block_row_ids(self, blocks: torch.Tensor) -> torch.Tensor:
        """Rows of `block_rows` for `blocks` [n], int64 [2 · num_kv_heads · n], heads outermost (keys, then values)."""
        return (self._head_offsets(self.num_blocks, blocks.device)[:, None] + blocks.flatten()).flatten()

    def token_row_ids(self, slot_mapping: torch.Tensor) -> torch.Tensor:
        """Rows of `token_rows` for slots [T] (block · block_size + i), int64 [T · 2 · heads], tokens outermost."""
        offsets = self._head_offsets(self.num_blocks * self.block_size, slot_mapping.device)
        return (slot_mapping[:, None] + offsets).flatten()

    def copy_blocks(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copies whole blocks in all layers: `source` and `destination` are int64 [n] block ids on the cache's device.

        All sources are read before any destination is written, so a block may be in both lists; destinations differ.
        """
        self._whole.index_copy_(3, destination, self._whole.index_select(3, source))

    def zero_blocks(self, blocks: torch.Tensor) -> None:
        """Zeroes whole blocks in all layers; `blocks` is int64 [n] on the cache's device."""
        self._whole.index_fill_(3, blocks, 0)

    def _head_offsets(self, stride: int, device: torch.device) -> torch.Tensor:
        return torch.arange(0, 2 * self.num_kv_heads * stride, stride, device=device)


def _zeros(shape: tuple[int, ...], placement: Placement) -> torch.Tensor:
    """Zeros; on the CPU in pages that the system fills when they are first written.

    A pool of 4 GiB then costs no time at start (torch.zeros writes it all: 1 to 2 s), and only blocks that were
    ever in use take memory. Huge pages are not asked for: a block has a piece in each layer and head, so they made the
    first use of 256 blocks (SmolLM2-135M) 5 to 20 times slower and gained the gather nothing.
    """
    if placement.device.type != "cpu":
        return torch.zeros(shape, dtype=placement.kv_dtype, device=placement.device)
    memory = mmap.mmap(-1, math.prod(shape) * placement.kv_dtype.itemsize)
    return torch.frombuffer(memory, dtype=placement.kv_dtype).view(shape)


def bytes_per_block(config: ModelConfig, dtype: torch.dtype, block_size: int) -> int:
    """Bytes that one block takes in all layers, keys and values."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return per_token * block_size

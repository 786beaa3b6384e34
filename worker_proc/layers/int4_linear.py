"""A linear layer whose weight stays 4-bit in memory, on a CPU; see `kernels.cpu.int4`.

Up to 8 rows are multiplied straight from the 4-bit numbers. For more the weight is first expanded into the blocks of
oneDNN, in memory that all layers of a shape share, and multiplied as any bfloat16 weight: the tiles of matrix units are
filled then, and the expansion is paid for by many rows.
"""

from collections.abc import Iterator

import numpy as np
import torch

from folovllm.worker_proc.kernels.cpu import int4
from folovllm.worker_proc.kernels.cpu.code_cache import CodeCache
from folovllm.worker_proc.kernels.cpu.compiled import Compiled
from folovllm.worker_proc.kernels.cpu.team import Team
from folovllm.worker_proc.layers.activation import silu_and_mul
from folovllm.worker_proc.layers.blocked import BlockedWeight, BlockLayout, look_into
from folovllm.worker_proc.layers.int4_layout import LANES, MIDDLE, PER_WORD, Int4Layout
from folovllm.worker_proc.layers.linear import ROWS_TO_PACK_FOR
from folovllm.worker_proc.layers.norm import RMSNorm
from folovllm.worker_proc.quantization.storage import InGroups, Quantized

_MOST_ROWS = 8


class Int4Kernels:
    """The compiled functions of a process, and the memory that weights are expanded into."""

    def __init__(self, team: Team, cache: CodeCache | None) -> None:
        self.team = team
        self._cache = cache
        self._products: dict[Int4Layout, Compiled] = {}
        self._expansions: dict[tuple[Int4Layout, BlockLayout | Int4Layout], Compiled] = {}
        self._scratch: dict[tuple[int, int], tuple[torch.Tensor, BlockedWeight | None]] = {}

    def product(self, layout: Int4Layout) -> int:
        """Address of the product's function."""
        if layout not in self._products:
            self._products[layout] = Compiled.by(self._cache, int4.build_product, layout)
        return self._products[layout].address

    def expansion(self, layout: Int4Layout, target: BlockedWeight) -> int:
        """Address of the function that expands into `target`."""
        key = layout, target.layout
        if key not in self._expansions:
            assert isinstance(target.layout, BlockLayout), "oneDNN's"
            self._expansions[key] = Compiled.by(self._cache, int4.build_expansion, layout, target.layout)
        return self._expansions[key].address

    def scratch(self, out_features: int, in_features: int) -> tuple[torch.Tensor, BlockedWeight | None]:
        """A packed bfloat16 weight of that shape, to be overwritten, and where its numbers lie; None if unknown."""
        key = out_features, in_features
        if key not in self._scratch:
            # Numbers by which places can be told apart, so that the layout is found.
            weight = torch.arange(out_features * in_features, dtype=torch.int32).mul_(40503).bitwise_and_(0x3FFF)
            plain = weight.to(torch.int16).view(torch.bfloat16).view(out_features, in_features)
            packed = torch.ops.mkldnn._reorder_linear_weight(plain, ROWS_TO_PACK_FOR)
            self._scratch[key] = packed, look_into(packed, plain)
        return self._scratch[key]


class Int4Linear:
    """`y = x · weightᵀ + bias`, the weight in 4 bits.

    Attributes:
        weight: where its blocks lie.
        blocked: the same, for kernels that compute whole steps; None if inputs have to be put in order before.
        order: int64 [in_features], which input stands where in the weight; None for their own order.
        bias: [out_features] or None.
    """

    def __init__(
        self,
        blocks: torch.Tensor,
        weight: BlockedWeight,
        kernels: Int4Kernels,
        *,
        order: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> None:
        """`blocks`: what `pack_blocks` has made; `weight` tells about it."""
        self._blocks, self._kernels = blocks, kernels
        self.weight, self.order, self.bias = weight, order, bias
        self.blocked = weight if order is None else None
        layout = weight.layout
        assert isinstance(layout, Int4Layout), "4-bit blocks"
        self._layout = layout
        self._padded_out = weight.num_blocks * LANES
        self._zeros = torch.zeros(self._padded_out)
        self._padded_bias = self._zeros.clone()
        if bias is not None:
            self._padded_bias[: len(bias)] = bias

    @property
    def num_bytes(self) -> int:
        """Of the weight."""
        return self._blocks.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features] → [T, out_features]."""
        if self.order is not None:
            x = x[:, self.order]
        return self._few(x) if len(x) <= _MOST_ROWS else self._many(x)

    def of_normed(self, hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """The product of the normed `hidden` [T, in_features]."""
        return self(norm(hidden))

    def gated(self, hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """`silu(gate) · up` of the normed `hidden`: [T, out_features / 2]."""
        return silu_and_mul(self(norm(hidden)))

    def add_to(self, hidden: torch.Tensor, x: torch.Tensor) -> None:
        """Adds the product of `x` [T, in_features] to `hidden` [T, out_features], in place."""
        hidden.add_(self(x))

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:  # noqa: ARG002 - it has none
        """None: it is made of tensors that were filled."""
        return iter(())

    def pack(self) -> None:
        """It is packed from the beginning."""

    def _few(self, x: torch.Tensor) -> torch.Tensor:
        wide, weight, team = x.float().contiguous(), self.weight, self._kernels.team
        output = torch.empty(len(x), self._padded_out)
        arguments = np.zeros(int4.NUM_PRODUCT_ARGUMENTS, np.int64)
        arguments[int4.X], arguments[int4.ROWS] = wide.data_ptr(), len(x)
        arguments[int4.WEIGHT], arguments[int4.BIAS] = weight.address, self._padded_bias.data_ptr()
        arguments[int4.PADDED_IN], arguments[int4.NUM_BLOCKS] = weight.padded_in, weight.num_blocks
        arguments[int4.OUT], arguments[int4.OUT_STRIDE] = output.data_ptr(), self._padded_out
        arguments[int4.ZEROS] = self._zeros.data_ptr()
        arguments[int4.THREAD_NUM], arguments[int4.NUM_THREADS] = team.thread_num_address, team.num_threads
        team.run(self._kernels.product(self._layout), arguments.ctypes.data)
        return output[:, : weight.out_features].to(x.dtype)

    def _many(self, x: torch.Tensor) -> torch.Tensor:
        packed, target = self._kernels.scratch(self.weight.out_features, self.weight.in_features)
        assert target is not None, "checked when the layer was made"
        weight, team = self.weight, self._kernels.team
        arguments = np.zeros(int4.NUM_EXPANSION_ARGUMENTS, np.int64)
        arguments[int4.SOURCE], arguments[int4.TARGET] = weight.address, target.address
        arguments[int4.INPUTS], arguments[int4.BLOCKS] = weight.padded_in, weight.num_blocks
        arguments[int4.TARGET_IN] = target.padded_in
        arguments[int4.EXPANSION_THREAD_NUM] = team.thread_num_address
        arguments[int4.EXPANSION_NUM_THREADS] = team.num_threads
        team.run(self._kernels.expansion(self._layout, target), arguments.ctypes.data)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")
        return product


def packed_linear(quantized: Quantized, bias: torch.Tensor | None, kernels: Int4Kernels) -> Int4Linear | None:
    """The layer of a weight with numbers from 0 to 15; None if its sizes or its groups are of an odd kind.

    Inputs that are dealt out to groups in any order are brought into the groups' order, once and for all.
    """
    inputs, outputs = quantized.numbers.shape
    grouped = InGroups.of(quantized)
    if grouped is None or inputs % LANES or grouped.group_size % PER_WORD:
        return None
    if kernels.scratch(outputs, inputs)[1] is None:
        return None
    layout = Int4Layout(grouped.group_size, bool((quantized.zeros != MIDDLE).any()))
    blocks, weight = pack_blocks(grouped.numbers, quantized.zeros, grouped.scales, layout)
    return Int4Linear(blocks, weight, kernels, order=grouped.order, bias=bias)


def pack_blocks(
    numbers: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, layout: Int4Layout
) -> tuple[torch.Tensor, BlockedWeight]:
    """Blocks as `kernels.cpu.int4` describes them.

    Args:
        numbers: uint8 [K, N], inputs in the order of their groups.
        zeros, scales: [G, N].
        layout: of the blocks.

    Returns:
        The memory, uint8 [blocks, bytes of a block], and its description, which is valid as long as the memory lives.
    """
    inputs, outputs = numbers.shape
    count = -(-outputs // LANES)
    fields = torch.zeros(inputs, count * LANES, dtype=torch.uint8)
    fields[:, :outputs] = numbers
    words = torch.zeros(inputs // PER_WORD, count * LANES, dtype=torch.int32)
    for place, part in enumerate(fields.view(-1, PER_WORD, count * LANES).unbind(1)):
        words |= part.to(torch.int32) << 4 * place
    pieces = [_in_blocks(words, count)]
    pieces.append(_in_blocks(_padded(scales.half(), count * LANES), count))
    if layout.asymmetric:
        pieces.append(_in_blocks(_padded(zeros.half() - MIDDLE, count * LANES), count))
    blocks = torch.cat(pieces, 1).contiguous()
    assert blocks.shape[1] == layout.block_bytes(inputs)
    return blocks, BlockedWeight(blocks.data_ptr(), outputs, inputs, inputs, layout)


def _padded(rows: torch.Tensor, width: int) -> torch.Tensor:
    padded = rows.new_zeros(rows.shape[0], width)
    padded[:, : rows.shape[1]] = rows
    return padded


def _in_blocks(rows: torch.Tensor, count: int) -> torch.Tensor:
    """[R, blocks · 16] → the bytes of each block's [R, 16]: uint8 [blocks, ...]."""
    return rows.view(-1, count, LANES).transpose(0, 1).contiguous().view(torch.uint8).flatten(1)

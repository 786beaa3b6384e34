"""A linear layer whose weight stays 4-bit on a GPU, multiplied by Triton's kernels; see `layers.int4_words`.

Which kernel serves depends on the number of rows alone:

* one or two rows: products on CUDA cores, with the norm before or the residual after them (`kernels.triton.int4_gemv`);
* tens of rows: products on tensor cores, numbers made floats in registers (`kernels.triton.int4_gemm`);
* more: the weight is expanded into memory that all layers share, and multiplied by cuBLAS.

On an H200 (Qwen3-0.6B's shapes, groups of 128, µs of a layer's products) CUDA cores were the faster for up to two rows:
21.6 against 26.1 at two, 32 against 27 at four. At 256 rows tensor cores took 43 and expansion 51; by a prototype's
figures expansion wins from 512 on.

Nothing waits for the device, and what is allocated in a step is its results: all of it can be captured.
"""

from collections.abc import Iterator

import torch

from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kernels.triton.activation import silu_and_mul
from folovllm.worker_proc.kernels.triton.int4_expand import expand
from folovllm.worker_proc.kernels.triton.int4_gemm import SplitScratch, add_int4_gemm, int4_gemm
from folovllm.worker_proc.kernels.triton.int4_gemv import add_int4_gemv, int4_gemv
from folovllm.worker_proc.layers.blocked import BlockedWeight
from folovllm.worker_proc.layers.int4_words import Int4Words, pack_words
from folovllm.worker_proc.layers.norm import RMSNorm
from folovllm.worker_proc.quantization.storage import Quantized

GEMV_ROWS = 2  # up to so many rows
GEMM_ROWS = 256
_MOST_EXPANDED = 2**24  # numbers at once, 32 MiB: a larger weight (a head) is expanded part by part


class Int4Scratch:
    """Memory that the 4-bit layers of a network share; none of it lives longer than a product."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.split = SplitScratch(placement.device)
        self._expanded = torch.empty(0, dtype=placement.dtype, device=placement.device)

    def make_room(self, weight: Int4Words) -> None:
        """To be called for every weight before the first product: steps that are captured keep the memory's address."""
        wanted = rows_at_once(weight) * weight.in_features
        if self._expanded.numel() < wanted:
            self._expanded = self._expanded.new_empty(wanted)

    def room(self, rows: int, columns: int) -> torch.Tensor:
        """[rows, columns], to be overwritten."""
        return self._expanded[: rows * columns].view(rows, columns)


class Int4TritonLinear:
    """`y = x · weightᵀ + bias`, the weight in 4 bits.

    Attributes:
        weight: [out_features, in_features].
        blocked: None: no kernel for the CPU takes it.
        bias: [out_features] or None.
    """

    def __init__(self, weight: Int4Words, bias: torch.Tensor | None, scratch: Int4Scratch) -> None:
        self.weight, self.bias = weight, bias
        self.blocked: BlockedWeight | None = None
        self._scratch = scratch
        self._dependent = scratch.placement.dependent_launch
        scratch.make_room(weight)

    @property
    def num_bytes(self) -> int:
        """Of the weight, with its scales and zeros."""
        return self.weight.num_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features] → [T, out_features]."""
        if len(x) <= GEMV_ROWS:
            return int4_gemv(x.contiguous(), self.weight, self.bias, dependent=self._dependent)
        x = self._in_order(x)
        if len(x) <= GEMM_ROWS:
            return int4_gemm(x, self.weight, self.bias, dependent=self._dependent)
        out = x.new_empty(len(x), self.weight.out_features)
        for first, weight in self._expanded():
            part = out[:, first : first + len(weight)]
            if self.bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(self.bias[first : first + len(weight)], x, weight.t(), out=part)
        return out

    def of_normed(self, hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """The product of the normed `hidden` [T, in_features]."""
        if len(hidden) <= GEMV_ROWS:
            return int4_gemv(hidden, self.weight, self.bias, (norm.weight, norm.eps), dependent=self._dependent)
        return self(norm(hidden))

    def gated(self, hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """`silu(gate) · up` of the normed `hidden`, for a weight that is gate and up: [T, out_features / 2]."""
        if len(hidden) <= GEMV_ROWS:
            given = norm.weight, norm.eps
            return int4_gemv(hidden, self.weight, self.bias, given, gated=True, dependent=self._dependent)
        normed = norm(hidden)
        if len(hidden) <= GEMM_ROWS:
            return int4_gemm(self._in_order(normed), self.weight, self.bias, gated=True, dependent=self._dependent)
        return silu_and_mul(self(normed), dependent=self._dependent)

    def add_to(self, hidden: torch.Tensor, x: torch.Tensor) -> None:
        """Adds the product of `x` [T, in_features] to `hidden` [T, out_features], in place."""
        if len(x) <= GEMV_ROWS:
            add_int4_gemv(hidden, x.contiguous(), self.weight, self.bias, dependent=self._dependent)
            return
        x = self._in_order(x)
        if len(x) <= GEMM_ROWS:
            add_int4_gemm(hidden, x, self.weight, self.bias, self._scratch.split, dependent=self._dependent)
            return
        for first, weight in self._expanded():
            part = hidden[:, first : first + len(weight)]
            torch.addmm(part, x, weight.t(), out=part)  # cuBLAS adds while it writes the product
        if self.bias is not None:
            hidden.add_(self.bias)

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:  # noqa: ARG002 - it has none
        """None: it is made of tensors that were filled."""
        return iter(())

    def pack(self) -> None:
        """It is packed from the beginning."""

    def _in_order(self, x: torch.Tensor) -> torch.Tensor:
        """Contiguous, with the inputs in the weight's order."""
        return x.contiguous() if self.weight.order is None else x.index_select(1, self.weight.order)

    def _expanded(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The weight, part by part: number of the part's first row, the part [rows, in_features]."""
        step = rows_at_once(self.weight)
        for first in range(0, self.weight.out_features, step):
            rows = min(step, self.weight.out_features - first)
            part = self._scratch.room(rows, self.weight.in_features)
            expand(self.weight, first, part)
            yield first, part


def rows_at_once(weight: Int4Words) -> int:
    """Rows that are expanded at once."""
    return min(weight.out_features, max(1, _MOST_EXPANDED // weight.in_features))


def words_linear(quantized: Quantized, bias: torch.Tensor | None, scratch: Int4Scratch) -> Int4TritonLinear | None:
    """The layer of a weight with numbers from 0 to 15; None if its groups or its scales are of an odd kind."""
    weight = pack_words(quantized)
    return None if weight is None else Int4TritonLinear(weight, bias, scratch)

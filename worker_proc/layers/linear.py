"""Linear layers whose weight may hold several of the checkpoint's projections one below the other.

One product for q, k and v (and one for gate and up) reads the activations once and costs one operator instead of three.

On the CPU a bf16 weight is packed once, after loading, into the blocked layout that oneDNN multiplies fastest. Without
it oneDNN rearranges the weight inside every call: on 2 cores with AVX-512 (Zen 4) the packed form takes 0.45 to 0.7
times as long for 1 to 8 rows, 0.55 to 0.85 times for 16 to 64 rows, and never longer. The row-major weight is dropped
then, so memory does not grow (but for a tied head: its embedding stays as it is). With AMX (2 cores of an Emerald
Rapids) packed and `matmul(weight, xᵀ)` of a row-major weight are equally fast from 2 rows on; for 1 row packed takes
0.7 times as long. Steps of a few rows read the packed weight too (`kernels.cpu.gemv`). One form for every row count
also means that nothing is chosen by a stopwatch, which could let one request come out differently from start to start.
"""

import itertools
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F

from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.layers.activation import silu_and_mul
from folovllm.worker_proc.layers.blocked import BlockedWeight, look_into
from folovllm.worker_proc.layers.norm import RMSNorm

if TYPE_CHECKING:
    from folovllm.worker_proc.kernels.triton.skinny_gemm import SplitScratch

# oneDNN's layout depends on the row count it is told to expect; what it gives for 16 serves 1 to 1,024 rows well.
ROWS_TO_PACK_FOR = 16
_EQUAL_ROWS = 32
_GEMV_COLUMNS = 4096  # `kernels.triton.gemv` holds a row of the weight in registers
# Up to so many rows `kernels.triton.skinny_gemm` is faster than cuBLAS (figures there): after a norm, and added.
_SKINNY_ROWS = 64
_SKINNY_ADD_ROWS = 32
# Of a weight: a product costs about 2.5 µs less than cuBLAS's at 8 rows, but numbers are read more slowly (a head of
# 156 M, 8 rows: 96 µs against 81; 32 rows: 89 against 84), so that larger ones would lose what is won. An estimate.
_SKINNY_NUMBERS = 24 * 2**20


class LinearLayer(Protocol):
    """What a network asks of one of its linear layers, whatever its weight is stored as.

    Attributes:
        blocked: where the numbers of its weight lie, for kernels that compute whole steps; None if they cannot use it.
        bias: [out_features] or None.
        num_bytes: of its weight, as it lies in memory.
    """

    @property
    def blocked(self) -> BlockedWeight | None: ...

    @property
    def bias(self) -> torch.Tensor | None: ...

    @property
    def num_bytes(self) -> int: ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features] → [T, out_features]."""
        ...

    def of_normed(self, hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """The product of the normed `hidden` [T, in_features]."""
        ...

    def gated(self, hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """`silu(gate) · up` of the normed `hidden`, for a weight that is gate and up: [T, out_features / 2]."""
        ...

    def add_to(self, hidden: torch.Tensor, x: torch.Tensor) -> None:
        """Adds the product of `x` [T, in_features] to `hidden` [T, out_features], in place."""
        ...

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Where each of the checkpoint's tensors goes: (name, what it is copied into)."""
        ...

    def pack(self) -> None:
        """To be called once its tensors are filled; those handed out before may not reach the weight any more."""
        ...


class LinearMaker(Protocol):
    """Makes a network's linear layers: where a quantization method says, module by module, what a projection is."""

    def __call__(
        self, prefix: str, in_features: int, parts: Mapping[str, int], /, *, bias: bool = False
    ) -> LinearLayer:
        """A layer of one or several projections of the same input.

        Args:
            prefix: full name of the module that holds them, with its dot ("model.layers.3.self_attn."); "" at the top.
            in_features: size of the input.
            parts: the projections' names in that module and their output sizes; the outputs lie side by side.
            bias: whether each has a bias.
        """
        ...


class DenseLinears:
    """The maker for checkpoints that are not quantized: projections of one input become one product."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._scratch = _split_scratch(placement)

    def __call__(
        self, _prefix: str, in_features: int, parts: Mapping[str, int], /, *, bias: bool = False
    ) -> LinearLayer:
        return Linear(in_features, parts, self._placement, bias=bias, scratch=self._scratch)


class Linear:
    """`y = x · weightᵀ + bias`.

    Attributes:
        weight: [out_features, in_features]; row-major until `pack`, possibly opaque afterwards.
        bias: [out_features] or None.
        blocked: where the numbers of the packed weight lie; None if it is not packed, or not known.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        placement: Placement,
        *,
        bias: bool = False,
        scratch: "SplitScratch | None" = None,
    ) -> None:
        """`parts` gives the checkpoint's names of the stacked projections and their output sizes, in order.

        `scratch`, which a network's layers share, lets programs on a GPU share the inputs of a product; without it
        cuBLAS takes all products of more than one row.
        """
        out_features = sum(parts.values())
        self._parts = dict(parts)
        self.weight = torch.empty(out_features, in_features, dtype=placement.dtype, device=placement.device)
        self.bias = torch.empty(out_features, dtype=placement.dtype, device=placement.device) if bias else None
        self.blocked: BlockedWeight | None = None
        self._packed = False
        self._batch_invariant = placement.batch_invariant
        self._use_triton = placement.use_triton
        self._dependent = placement.dependent_launch
        self._scratch = scratch

    @classmethod
    def tied(cls, weight: torch.Tensor, placement: Placement) -> "Linear":
        """A layer that multiplies by a weight that belongs to someone else (an embedding [vocab, hidden])."""
        layer = cls(weight.shape[1], {}, placement)
        layer.weight = weight
        return layer

    @property
    def num_bytes(self) -> int:
        """Of the weight: a packed one does not tell, but has the same numbers and some padding."""
        return self.weight.numel() * self.weight.element_size()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features] → [T, out_features]."""
        return in_equal_parts(self._product, x) if self._batch_invariant else self._product(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed:
            packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return packed
        return F.linear(x, self.weight, self.bias)

    def of_normed(self, hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """The product of the normed `hidden` [T, in_features]."""
        if self._takes_gemv(hidden):
            return self._normed_gemv(hidden, norm, gated=False)
        if self._takes_skinny(hidden, _SKINNY_ROWS):
            return self._normed_skinny(hidden, norm, gated=False)
        return self(norm(hidden))

    def gated(self, hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """`silu(gate) · up` of the normed `hidden`, for a weight that is gate and up: [T, out_features / 2]."""
        if self._takes_gemv(hidden):
            return self._normed_gemv(hidden, norm, gated=True)
        if self._takes_skinny(hidden, _SKINNY_ROWS):
            return self._normed_skinny(hidden, norm, gated=True)
        gate_and_up = self(norm(hidden))
        if self._use_triton:
            from folovllm.worker_proc.kernels.triton import activation

            return activation.silu_and_mul(gate_and_up, dependent=self._dependent)
        return silu_and_mul(gate_and_up)

    def add_to(self, hidden: torch.Tensor, x: torch.Tensor) -> None:
        """Adds the product of `x` [T, in_features] to `hidden` [T, out_features], in place."""
        if self._takes_gemv(x):
            from folovllm.worker_proc.kernels.triton.gemv import add_gemv

            add_gemv(hidden, x, self.weight, dependent=self._dependent)
        elif self._scratch is not None and self._takes_skinny(x, _SKINNY_ADD_ROWS):
            from folovllm.worker_proc.kernels.triton.skinny_gemm import add_skinny_gemm

            add_skinny_gemm(hidden, x.contiguous(), self.weight, self._scratch, dependent=self._dependent)
        elif self._use_triton and self.bias is None:
            torch.addmm(hidden, x, self.weight.t(), out=hidden)  # cuBLAS adds while it writes the product
        else:
            hidden.add_(self(x))

    def _takes_gemv(self, x: torch.Tensor) -> bool:
        return self._use_triton and x.shape[0] == 1 and x.shape[1] <= _GEMV_COLUMNS and self.bias is None

    def _normed_gemv(self, hidden: torch.Tensor, norm: RMSNorm, *, gated: bool) -> torch.Tensor:
        from folovllm.worker_proc.kernels.triton.gemv import normed_gemv

        return normed_gemv(hidden, norm.weight, norm.eps, self.weight, gated=gated, dependent=self._dependent)

    def _takes_skinny(self, x: torch.Tensor, most_rows: int) -> bool:
        if self._scratch is None or self.bias is not None or x.dtype == torch.float32:
            return False
        return x.shape[0] <= most_rows and self.weight.numel() <= _SKINNY_NUMBERS

    def _normed_skinny(self, hidden: torch.Tensor, norm: RMSNorm, *, gated: bool) -> torch.Tensor:
        from folovllm.worker_proc.kernels.triton.skinny_gemm import skinny_gemm, takes_norm

        if takes_norm(*hidden.shape, gated=gated):
            given = norm.weight, norm.eps
            return skinny_gemm(hidden, self.weight, norm=given, gated=gated, dependent=self._dependent)
        return skinny_gemm(norm(hidden), self.weight, gated=gated, dependent=self._dependent)

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Where each of the checkpoint's tensors goes: (name, view into this layer's weight or bias)."""
        ends = list(itertools.accumulate(self._parts.values()))
        for (name, size), end in zip(self._parts.items(), ends, strict=True):
            yield f"{prefix}{name}.weight", self.weight[end - size : end]
            if self.bias is not None:
                yield f"{prefix}{name}.bias", self.bias[end - size : end]

    def pack(self) -> None:
        """Brings the loaded weight into its fastest layout; views handed out before do not reach it any more."""
        if can_pack(self.weight):
            packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, ROWS_TO_PACK_FOR)
            self.blocked = look_into(packed, self.weight)
            self.weight, self._packed = packed, True


def _split_scratch(placement: Placement) -> "SplitScratch | None":
    """None also on a GPU that has too little shared memory for what uses it."""
    if not placement.use_triton:
        return None
    from folovllm.worker_proc.kernels.triton.skinny_gemm import SplitScratch, runs_on

    return SplitScratch(placement.device) if runs_on(placement.device) else None


def in_equal_parts(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`product` of always the same number of rows, the last part filled up with zeros: [T, in] → [T, out].

    How oneDNN cuts a sum over the inputs depends on the number of rows (seen with AMX: 1 to 32 rows of 576 inputs add
    up in another order than 33 and more), but not on a row's place among them. With AMX 16 rows take as long as one, 64
    take 1.4 times as long; a prompt of 1,024 tokens reads the weights 32 times, from the cache.
    """
    outputs = []
    for part in x.split(_EQUAL_ROWS):
        rows = F.pad(part, (0, 0, 0, _EQUAL_ROWS - len(part)))
        outputs.append(product(rows)[: len(part)])
    return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a faster layout for this weight: bf16, on an x86 CPU that oneDNN has bf16 kernels for."""
    if platform.machine() not in ("x86_64", "AMD64"):  # elsewhere not measured
        return False
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

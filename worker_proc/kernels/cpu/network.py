"""A network's addresses and the memory between its parts, for the functions of `decode_step` and `gemv`."""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from folovllm.worker_proc.device import dtype_name
from folovllm.worker_proc.kernels.cpu import decode_step, gemv
from folovllm.worker_proc.kernels.cpu.code_cache import CodeCache
from folovllm.worker_proc.kernels.cpu.decode_attention import DecodeAttention
from folovllm.worker_proc.kernels.cpu.decode_step import NUM_LAYER_FIELDS, StepShape, StepSizes, build_step
from folovllm.worker_proc.kernels.cpu.gemv import ROW_COUNTS, ProductShape, build_product, row_count
from folovllm.worker_proc.kernels.cpu.llvm import Compiled
from folovllm.worker_proc.kernels.cpu.team import Team
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.layers.blocked import BlockedWeight
from folovllm.worker_proc.layers.linear import LinearLayer
from folovllm.worker_proc.layers.parts import LayerParts, NetworkParts

MAX_ROWS = ROW_COUNTS[-1]


@dataclasses.dataclass(frozen=True)
class _Product:
    """A linear layer whose packed weight can be read."""

    weight: BlockedWeight
    bias: torch.Tensor | None

    @classmethod
    def of(cls, layer: LinearLayer) -> "_Product | None":
        return None if layer.blocked is None else cls(layer.blocked, layer.bias)


@dataclasses.dataclass(frozen=True)
class _Layer:
    parts: LayerParts
    products: tuple[_Product, ...]


class NetworkPlan:
    """A network that the kernels can compute."""

    def __init__(self, parts: NetworkParts, layers: list[_Layer], head: _Product, shape: StepShape) -> None:
        self.parts, self.layers, self.head, self.shape = parts, layers, head, shape


def plan_network(parts: NetworkParts, kv: KVTensors, num_q_heads: int) -> NetworkPlan | None:
    """What is to be compiled for this network; None if a weight is not packed or a size odd."""
    layers = []
    for layer in parts.layers:
        linears = (layer.qkv, layer.out, layer.gate_up, layer.down)
        products = [product for linear in linears if (product := _Product.of(linear)) is not None]
        if len(products) < len(linears):
            return None
        layers.append(_Layer(layer, tuple(products)))
    head = _Product.of(parts.head)
    shapes = {tuple(ProductShape.of(product.weight) for product in layer.products) for layer in layers}
    if head is None or len(shapes) != 1:
        return None
    first = parts.layers[0]
    (products_of_all,) = shapes
    shape = StepShape(
        num_q_heads,
        kv.num_kv_heads,
        kv.head_dim,
        first.head_norm is not None,
        first.input_norm.eps,
        dtype_name(parts.embedding.dtype),
        *products_of_all,
    )
    return NetworkPlan(parts, layers, head, shape) if shape.is_supported else None


class DecodeNetwork:
    """Steps of up to `max_rows` decoding requests, and logits of as many hidden states."""

    max_rows = MAX_ROWS

    def __init__(
        self, plan: NetworkPlan, attention: DecodeAttention, kv: KVTensors, team: Team, cache: CodeCache | None
    ) -> None:
        self._plan, self._attention, self._kv, self._team = plan, attention, kv, team
        self._step_code = Compiled(build_step(plan.shape), cache)
        self._head = HeadProduct(plan.head.weight, plan.head.bias, team, cache)
        self._sizes = StepSizes.of(plan.shape)
        self._biases: list[torch.Tensor] = []
        self._zeros = torch.zeros(max(product.padded_out for product in plan.shape.products))
        self._table = self._layer_table()
        self._caches = self._table[:, decode_step.CACHE].copy()
        self._scratch = self._make_scratch()
        self._arguments = self._make_arguments()

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        table: torch.Tensor,
        lens: list[int],
    ) -> torch.Tensor:
        """Hidden states [R, hidden_size] of R ≤ `max_rows` requests' one token each, the last norm applied.

        Args:
            input_ids, positions, slots: int64 [R]; see `attention.backend.AttentionMetadata`.
            table: int64 [R, blocks].
            lens: tokens of each request, the new one included.
        """
        rows = len(lens)
        output = torch.empty(rows, self._plan.shape.hidden, dtype=self._plan.parts.embedding.dtype)
        attention = self._attention.plan(table, lens, self._kv.layer(0))
        query, attended = self._scratch["query"], self._scratch["attended"]
        function, layers = attention.for_layers(query.data_ptr(), attended.data_ptr(), self._caches)
        arguments = self._arguments
        arguments[decode_step.ROWS], arguments[decode_step.ROW_COUNT] = rows, row_count(rows)
        arguments[decode_step.TOKEN_IDS] = input_ids.data_ptr()
        arguments[decode_step.POSITIONS] = positions.data_ptr()
        arguments[decode_step.SLOTS] = slots.data_ptr()
        arguments[decode_step.ATTENTION] = function
        arguments[decode_step.ATTENTION_ARGUMENTS] = layers.ctypes.data
        arguments[decode_step.ATTENTION_STRIDE] = layers.strides[0]
        arguments[decode_step.OUTPUT] = output.data_ptr()
        self._team.run(self._step_code.address, arguments.ctypes.data)
        return output

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] with R ≤ `max_rows` → float32 [R, vocab_size]."""
        return self._head(hidden)

    def _layer_table(self) -> npt.NDArray[np.int64]:
        table = np.zeros((len(self._plan.layers), NUM_LAYER_FIELDS), np.int64)
        for index, (row, layer) in enumerate(zip(table, self._plan.layers, strict=True)):
            for place, product in enumerate(layer.products):
                row[2 * place] = product.weight.address
                row[2 * place + 1] = self._bias(product)
            row[decode_step.INPUT_NORM] = layer.parts.input_norm.weight.data_ptr()
            row[decode_step.POST_NORM] = layer.parts.post_norm.weight.data_ptr()
            if layer.parts.head_norm is not None:
                row[decode_step.HEAD_NORM] = layer.parts.head_norm.weight.data_ptr()
            row[decode_step.CACHE] = self._kv.layer(index).data_ptr()
        return table

    def _bias(self, product: _Product) -> int:
        """Address of the bias in float32, padded to whole blocks."""
        if product.bias is None:
            return self._zeros.data_ptr()
        self._biases.append(padded_bias(product.weight, product.bias))
        return self._biases[-1].data_ptr()

    def _make_scratch(self) -> dict[str, torch.Tensor]:
        sizes, shape, dtype = self._sizes, self._plan.shape, self._plan.parts.embedding.dtype
        heads = shape.num_q_heads * shape.head_dim
        return {
            "hidden": torch.zeros(MAX_ROWS, sizes.hidden),
            "heads": torch.zeros(MAX_ROWS, sizes.heads),
            "gate_up": torch.zeros(MAX_ROWS, sizes.gate_up),
            "activated": torch.zeros(MAX_ROWS, sizes.activated),
            "own": torch.zeros(self._team.num_threads, sizes.own),
            "query": torch.zeros(MAX_ROWS, heads, dtype=dtype),
            "attended": torch.zeros(MAX_ROWS, heads, dtype=dtype),
            "counter": torch.zeros(8, dtype=torch.int64),  # a cache line of its own
        }

    def _make_arguments(self) -> npt.NDArray[np.int64]:
        parts, scratch, team = self._plan.parts, self._scratch, self._team
        arguments = np.zeros(decode_step.NUM_STEP_ARGUMENTS, np.int64)
        for place, number in {
            decode_step.NUM_LAYERS: len(self._table),
            decode_step.EMBEDDING: parts.embedding.data_ptr(),
            decode_step.COS: parts.rotary.cos.data_ptr(),
            decode_step.SIN: parts.rotary.sin.data_ptr(),
            decode_step.LAYERS: self._table.ctypes.data,
            decode_step.FINAL_NORM: parts.norm.weight.data_ptr(),
            decode_step.HEAD_BYTES: self._kv.layer(0).stride(1) * gemv.ELEMENT_BYTES,
            decode_step.HIDDEN: scratch["hidden"].data_ptr(),
            decode_step.HEADS: scratch["heads"].data_ptr(),
            decode_step.GATE_UP: scratch["gate_up"].data_ptr(),
            decode_step.ACTIVATED: scratch["activated"].data_ptr(),
            decode_step.OWN: scratch["own"].data_ptr(),
            decode_step.QUERY: scratch["query"].data_ptr(),
            decode_step.ATTENDED: scratch["attended"].data_ptr(),
            decode_step.ZEROS: self._zeros.data_ptr(),
            decode_step.THREAD_NUM: team.thread_num_address,
            decode_step.NUM_THREADS: team.num_threads,
            decode_step.COUNTER: scratch["counter"].data_ptr(),
            decode_step.YIELD: team.yield_address,
        }.items():
            arguments[place] = number
        return arguments


class HeadProduct:
    """Logits of a few rows, in float32: they are not rounded, and not widened again for the sampler."""

    def __init__(self, weight: BlockedWeight, bias: torch.Tensor | None, team: Team, cache: CodeCache | None) -> None:
        self._team, self._weight, self.in_features = team, weight, weight.in_features
        self._shape = ProductShape.of(weight)
        self._code = Compiled(build_product(self._shape), cache)
        self._zeros = torch.zeros(self._shape.padded_out)
        self._bias = self._zeros if bias is None else padded_bias(weight, bias)
        self._own = torch.zeros(team.num_threads, MAX_ROWS * self._shape.padded_in)
        arguments = np.zeros(gemv.NUM_PRODUCT_ARGUMENTS, np.int64)
        arguments[gemv.WEIGHT], arguments[gemv.BIAS] = weight.address, self._bias.data_ptr()
        arguments[gemv.OWN], arguments[gemv.ZEROS] = self._own.data_ptr(), self._zeros.data_ptr()
        arguments[gemv.THREAD_NUM], arguments[gemv.NUM_THREADS] = team.thread_num_address, team.num_threads
        self._arguments = arguments

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[R, in_features] with R ≤ `MAX_ROWS` → float32 [R, out_features], rows possibly apart."""
        x = x.contiguous()
        rows, count = len(x), row_count(len(x))
        output = torch.empty(count, self._shape.padded_out)
        arguments = self._arguments
        arguments[gemv.X], arguments[gemv.ROWS], arguments[gemv.ROW_COUNT] = x.data_ptr(), rows, count
        arguments[gemv.OUT] = output.data_ptr()
        self._team.run(self._code.address, arguments.ctypes.data)
        return output[:rows, : self._shape.out_features]


def padded_bias(weight: BlockedWeight, bias: torch.Tensor) -> torch.Tensor:
    """Float32, as long as whole blocks."""
    padded = torch.zeros(weight.num_blocks * weight.layout.width)
    padded[: len(bias)] = bias
    return padded

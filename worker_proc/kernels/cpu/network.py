"""A network's addresses and the memory between its parts, for the functions of `decode_step`, `wide_step`, `gemv`."""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from folovllm.worker_proc.attention.backend import AttentionMetadata
from folovllm.worker_proc.device import dtype_name
from folovllm.worker_proc.kernels.cpu import decode_step, gemv, wide_step
from folovllm.worker_proc.kernels.cpu.chunk_attention import ChunkAttention, ChunkPlan
from folovllm.worker_proc.kernels.cpu.chunk_products import Form
from folovllm.worker_proc.kernels.cpu.code_cache import CodeCache
from folovllm.worker_proc.kernels.cpu.compiled import Compiled
from folovllm.worker_proc.kernels.cpu.decode_attention import DecodeAttention, DecodePlan
from folovllm.worker_proc.kernels.cpu.decode_step import (
    NUM_LAYER_FIELDS,
    PRODUCTS_OF_LAYER,
    StepShape,
    StepSizes,
    build_step,
)
from folovllm.worker_proc.kernels.cpu.gemv import ROW_COUNTS, ProductShape, build_product, row_count
from folovllm.worker_proc.kernels.cpu.llvm import counters
from folovllm.worker_proc.kernels.cpu.team import Team
from folovllm.worker_proc.kernels.cpu.tile_products import TILE, takes
from folovllm.worker_proc.kernels.cpu.wide_step import build_wide_product, build_wide_step, can_be_wide, wide_form
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.layers.blocked import BlockedWeight
from folovllm.worker_proc.layers.linear import LinearLayer
from folovllm.worker_proc.layers.parts import LayerParts, NetworkParts

FEW_ROWS = ROW_COUNTS[-1]
_LOGITS_GAP = 16  # numbers between rows of logits: without, 16 rows of 49,152 lie in one set of the nearest cache
_COUNTER_WORDS = 8  # a cache line of its own


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


class CompiledNetwork:
    """Steps and logits of a network.

    Steps of up to `FEW_ROWS` decoding requests are always there; steps of more rows, or with chunks, where the
    processor multiplies bf16 numbers and the sizes are whole tiles.
    """

    def __init__(
        self,
        plan: NetworkPlan,
        attention: DecodeAttention,
        chunks: ChunkAttention | None,
        kv: KVTensors,
        team: Team,
        cache: CodeCache | None,
        *,
        form: Form | None = None,
    ) -> None:
        """`chunks`: None leaves steps of many rows to torch; `form`: of these, for tests, None takes the fastest."""
        memory = _NetworkMemory(plan, kv, team)
        self._few = _FewRows(plan, attention, memory, team, Compiled.by(cache, build_step, plan.shape))
        head = plan.head
        self._head = HeadProduct(head.weight, head.bias, team, cache)
        self._wide: _WideSteps | None = None
        self._wide_head: WideHead | None = None
        form = form or wide_form(tiles_allowed=chunks is not None and chunks.form is Form.AMX)
        if chunks is not None and form is not None and can_be_wide(plan.shape):
            self._wide = _WideSteps(
                plan, (attention, chunks), memory, team, Compiled.by(cache, build_wide_step, plan.shape, form)
            )
            if takes(ProductShape.of(head.weight)):
                self._wide_head = WideHead(head.weight, head.bias, form, team, cache)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor | None:
        """Hidden states [T, hidden_size] of T tokens, the last norm applied; None: there is no code for such a step.

        Args:
            input_ids, positions: int64 [T].
            metadata: the step's.
        """
        rows = len(metadata.query_lens)
        if metadata.num_decodes == rows <= FEW_ROWS:
            return self._few.forward(input_ids, positions, metadata)
        return None if self._wide is None else self._wide.forward(input_ids, positions, metadata)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[R, hidden_size] → float32 [R, vocab_size], rows possibly apart; None: there is no code for so many."""
        if len(hidden) <= FEW_ROWS:
            return self._head(hidden)
        return None if self._wide_head is None else self._wide_head(hidden)


class _NetworkMemory:
    """Where a network's weights, norms and caches lie.

    Attributes:
        table: int64 [layers, NUM_LAYER_FIELDS].
        caches: int64 [layers].
        arguments: of a step's function, as far as they are the same in all steps.
    """

    def __init__(self, plan: NetworkPlan, kv: KVTensors, team: Team) -> None:
        self._plan, self._kv = plan, kv
        self._biases: list[torch.Tensor] = []
        self._zeros = torch.zeros(max(product.padded_out for product in plan.shape.products))
        self._counter = torch.zeros(_COUNTER_WORDS, dtype=torch.int64)
        self.table = self._layer_table()
        self.caches = self.table[:, decode_step.CACHE].copy()
        self.arguments = self._arguments(team)

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

    def _arguments(self, team: Team) -> npt.NDArray[np.int64]:
        parts = self._plan.parts
        arguments = np.zeros(decode_step.NUM_STEP_ARGUMENTS, np.int64)
        for place, number in {
            decode_step.NUM_LAYERS: len(self.table),
            decode_step.EMBEDDING: parts.embedding.data_ptr(),
            decode_step.COS: parts.rotary.cos.data_ptr(),
            decode_step.SIN: parts.rotary.sin.data_ptr(),
            decode_step.LAYERS: self.table.ctypes.data,
            decode_step.FINAL_NORM: parts.norm.weight.data_ptr(),
            decode_step.HEAD_BYTES: self._kv.layer(0).stride(1) * gemv.ELEMENT_BYTES,
            decode_step.ZEROS: self._zeros.data_ptr(),
            decode_step.THREAD_NUM: team.thread_num_address,
            decode_step.NUM_THREADS: team.num_threads,
            decode_step.COUNTER: self._counter.data_ptr(),
            decode_step.YIELD: team.yield_address,
        }.items():
            arguments[place] = number
        return arguments

    @property
    def cache(self) -> torch.Tensor:
        """One layer's."""
        return self._kv.layer(0)


class _Steps:
    """What steps of few and of many rows have in common."""

    def __init__(self, plan: NetworkPlan, memory: _NetworkMemory, team: Team, code: Compiled) -> None:
        self._plan, self._memory, self._team, self._code = plan, memory, team, code
        self._arguments = memory.arguments.copy()
        self._drawn = counters(len(memory.table) * PRODUCTS_OF_LAYER * team.num_threads)
        self._arguments[decode_step.DRAWN] = self._drawn.ctypes.data
        self._scratch: dict[int, torch.Tensor] = {}
        self._kept: dict[int, tuple[DecodePlan | ChunkPlan, npt.NDArray[np.int64]]] = {}

    def _set_scratch(self, scratch: dict[int, torch.Tensor]) -> None:
        """`scratch`: by argument."""
        self._scratch = scratch
        for place, tensor in scratch.items():
            self._arguments[place] = tensor.data_ptr()

    def _set_attention(self, places: tuple[int, int, int], plan: DecodePlan | ChunkPlan) -> None:
        """What a part of the step's attention is called with; kept, as the step reads it, until the next is set."""
        query, attended = self._scratch[decode_step.QUERY], self._scratch[decode_step.ATTENDED]
        function, layers = plan.for_layers(query.data_ptr(), attended.data_ptr(), self._memory.caches)
        for place, number in zip(places, (function, layers.ctypes.data, layers.strides[0]), strict=True):
            self._arguments[place] = number
        self._kept[places[0]] = plan, layers

    def _run(self, input_ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, count: int) -> torch.Tensor:
        """`count`: rows there is code for."""
        output = torch.empty(len(input_ids), self._plan.shape.hidden, dtype=self._plan.parts.embedding.dtype)
        arguments = self._arguments
        arguments[decode_step.ROWS], arguments[decode_step.ROW_COUNT] = len(input_ids), count
        arguments[decode_step.TOKEN_IDS] = input_ids.data_ptr()
        arguments[decode_step.POSITIONS] = positions.data_ptr()
        arguments[decode_step.SLOTS] = slots.data_ptr()
        arguments[decode_step.OUTPUT] = output.data_ptr()
        self._drawn.fill(0)
        self._team.run(self._code.address, arguments.ctypes.data)
        return output


_DECODES = (decode_step.ATTENTION, decode_step.ATTENTION_ARGUMENTS, decode_step.ATTENTION_STRIDE)
_CHUNKS = (decode_step.CHUNKS, decode_step.CHUNK_ARGUMENTS, decode_step.CHUNK_STRIDE)


class _FewRows(_Steps):
    """Steps of up to `FEW_ROWS` decoding requests."""

    def __init__(
        self,
        plan: NetworkPlan,
        attention: DecodeAttention,
        memory: _NetworkMemory,
        team: Team,
        code: Compiled,
    ) -> None:
        super().__init__(plan, memory, team, code)
        self._attention = attention
        sizes, dtype = StepSizes.of(plan.shape), plan.parts.embedding.dtype
        heads = plan.shape.num_q_heads * plan.shape.head_dim
        self._set_scratch(
            {
                decode_step.HIDDEN: torch.zeros(FEW_ROWS, sizes.hidden),
                decode_step.HEADS: torch.zeros(FEW_ROWS, sizes.heads),
                decode_step.GATE_UP: torch.zeros(FEW_ROWS, sizes.gate_up),
                decode_step.ACTIVATED: torch.zeros(FEW_ROWS, sizes.activated),
                decode_step.OWN: torch.zeros(team.num_threads, sizes.own),
                decode_step.QUERY: torch.zeros(FEW_ROWS, heads, dtype=dtype),
                decode_step.ATTENDED: torch.zeros(FEW_ROWS, heads, dtype=dtype),
            }
        )

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """See `CompiledNetwork.forward`."""
        attention = self._attention.plan(metadata.block_table, metadata.seq_lens, self._memory.cache)
        self._set_attention(_DECODES, attention)
        return self._run(input_ids, positions, metadata.slot_mapping, row_count(len(input_ids)))


class _WideSteps(_Steps):
    """Steps of any number of rows."""

    def __init__(
        self,
        plan: NetworkPlan,
        kernels: tuple[DecodeAttention, ChunkAttention],
        memory: _NetworkMemory,
        team: Team,
        code: Compiled,
    ) -> None:
        super().__init__(plan, memory, team, code)
        self._attention, self._chunks = kernels
        self._own = torch.zeros(team.num_threads, wide_step.own_bytes(plan.shape), dtype=torch.uint8)
        self._room = 0

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """See `CompiledNetwork.forward`."""
        count = -(-len(input_ids) // TILE) * TILE
        self._make_room(count)
        for place in (decode_step.ATTENTION, decode_step.CHUNKS):
            self._arguments[place] = 0
        if metadata.num_decodes:
            requests = slice(0, metadata.num_decodes)
            table, lens = metadata.block_table[requests], metadata.seq_lens[requests]
            self._set_attention(_DECODES, self._attention.plan(table, lens, self._memory.cache))
        if metadata.num_decodes < len(metadata.query_lens):
            self._set_attention(_CHUNKS, self._chunks.plan(metadata, self._memory.cache))
        return self._run(input_ids, positions, metadata.slot_mapping, count)

    def _make_room(self, count: int) -> None:
        if count <= self._room:
            return
        self._room = count
        sizes, shape, dtype = StepSizes.of(self._plan.shape), self._plan.shape, self._plan.parts.embedding.dtype
        heads = shape.num_q_heads * shape.head_dim
        self._set_scratch(
            {
                decode_step.HIDDEN: torch.zeros(count, sizes.hidden),
                decode_step.HEADS: torch.zeros(count, sizes.heads),
                decode_step.ACTIVATED: torch.zeros(count, shape.intermediate, dtype=dtype),
                decode_step.NORMED: torch.zeros(count, shape.hidden, dtype=dtype),
                decode_step.OWN: self._own,
                decode_step.QUERY: torch.zeros(count, heads, dtype=dtype),
                decode_step.ATTENDED: torch.zeros(count, heads, dtype=dtype),
            }
        )


class HeadProduct:
    """Logits of a few rows, in float32: they are not rounded, and not widened again for the sampler."""

    def __init__(self, weight: BlockedWeight, bias: torch.Tensor | None, team: Team, cache: CodeCache | None) -> None:
        self._team, self._weight, self.in_features = team, weight, weight.in_features
        self._shape = ProductShape.of(weight)
        self._code = Compiled.by(cache, build_product, self._shape)
        self._zeros = torch.zeros(self._shape.padded_out)
        self._bias = self._zeros if bias is None else padded_bias(weight, bias)
        self._own = torch.zeros(team.num_threads, FEW_ROWS * self._shape.padded_in)
        arguments = np.zeros(gemv.NUM_PRODUCT_ARGUMENTS, np.int64)
        arguments[gemv.WEIGHT], arguments[gemv.BIAS] = weight.address, self._bias.data_ptr()
        arguments[gemv.OWN], arguments[gemv.ZEROS] = self._own.data_ptr(), self._zeros.data_ptr()
        arguments[gemv.THREAD_NUM], arguments[gemv.NUM_THREADS] = team.thread_num_address, team.num_threads
        self._drawn = counters(team.num_threads)
        arguments[gemv.DRAWN] = self._drawn.ctypes.data
        self._arguments = arguments

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[R, in_features] with R ≤ `FEW_ROWS` → float32 [R, out_features], rows possibly apart."""
        x = x.contiguous()
        rows, count = len(x), row_count(len(x))
        output = torch.empty(count, self._shape.padded_out)
        arguments = self._arguments
        arguments[gemv.X], arguments[gemv.ROWS], arguments[gemv.ROW_COUNT] = x.data_ptr(), rows, count
        arguments[gemv.OUT] = output.data_ptr()
        self._drawn.fill(0)
        self._team.run(self._code.address, arguments.ctypes.data)
        return output[:rows, : self._shape.out_features]


class WideHead:
    """Logits of many rows, in float32."""

    def __init__(
        self, weight: BlockedWeight, bias: torch.Tensor | None, form: Form, team: Team, cache: CodeCache | None
    ) -> None:
        self._team = team
        self._shape = shape = ProductShape.of(weight)
        self._code = Compiled.by(cache, build_wide_product, shape, form)
        self._bias = torch.zeros(shape.padded_out) if bias is None else padded_bias(weight, bias)
        self._own = torch.zeros(team.num_threads, wide_step.product_own_bytes(shape), dtype=torch.uint8)
        arguments = np.zeros(wide_step.NUM_PRODUCT_ARGUMENTS, np.int64)
        arguments[wide_step.WEIGHT], arguments[wide_step.BIAS] = weight.address, self._bias.data_ptr()
        arguments[wide_step.PRODUCT_OWN] = self._own.data_ptr()
        arguments[wide_step.OUT_STRIDE] = shape.padded_out + _LOGITS_GAP
        arguments[wide_step.PRODUCT_THREAD_NUM] = team.thread_num_address
        arguments[wide_step.PRODUCT_NUM_THREADS] = team.num_threads
        self._drawn = counters(team.num_threads)
        arguments[wide_step.PRODUCT_DRAWN] = self._drawn.ctypes.data
        self._arguments = arguments
        self._rows = torch.zeros(0, shape.in_features, dtype=torch.bfloat16)
        self._output = torch.zeros(0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[R, in_features] → float32 [R, out_features], rows apart; valid until the next call.

        The memory stays: for 64 rows of 49,152 the system would hand out 12 MB of zeros each time, which takes longer
        than the product.
        """
        num_tiles = -(-len(x) // TILE)
        if len(self._rows) < num_tiles * TILE:
            self._rows = x.new_zeros(num_tiles * TILE, self._shape.in_features)
            self._output = torch.zeros(len(self._rows), self._shape.padded_out + _LOGITS_GAP)
        rows, output, arguments = self._rows, self._output, self._arguments
        rows[: len(x)] = x
        arguments[wide_step.X], arguments[wide_step.NUM_TILES] = rows.data_ptr(), num_tiles
        arguments[wide_step.PRODUCT_OUT] = output.data_ptr()
        self._drawn.fill(0)
        self._team.run(self._code.address, arguments.ctypes.data)
        return output[: len(x), : self._shape.out_features]


def padded_bias(weight: BlockedWeight, bias: torch.Tensor) -> torch.Tensor:
    """Float32, as long as whole blocks."""
    padded = torch.zeros(weight.num_blocks * weight.layout.width)
    padded[: len(bias)] = bias
    return padded

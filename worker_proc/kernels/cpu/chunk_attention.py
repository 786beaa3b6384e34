"""Attention of prompt chunks: several new tokens of a request over its whole context, straight from the paged blocks.

Idea (FlashAttention, Dao et al., 2022): a tile of queries meets 128 keys at a time; what it has seen so far is kept as
largest score, sum of weights and weighted sum of values, which are scaled when a larger score comes. So scores and
weights never leave the nearest cache, and only keys that the tile may see are looked at: no gather, no mask.

A tile has up to 384 rows, a row being a token's query head; the heads of a group follow one another, so that K and V
are read once for all of them. 32 rows at a time meet as many keys as any of them may see. Rows are lanes (see
`chunk_products`): nothing is ever added up across a vector. A row's result depends on nothing but its own keys, in
blocks of 128 from the first on: a request comes out the same alone and in company, whole and in chunks. Threads draw
tiles, the costliest first, until none is left.
"""

import ctypes
import dataclasses
import heapq
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir

from folovllm.worker_proc.attention.backend import AttentionMetadata
from folovllm.worker_proc.kernels.cpu.chunk_products import (
    KEYS,
    LANES,
    PAIRED,
    SUB,
    VECTOR_BYTES,
    Areas,
    Form,
    best_form,
    make_products,
    tiles,
)
from folovllm.worker_proc.kernels.cpu.code_cache import CodeCache
from folovllm.worker_proc.kernels.cpu.compiled import Compiled
from folovllm.worker_proc.kernels.cpu.decode_attention import HeadShape
from folovllm.worker_proc.kernels.cpu.llvm import F32, I32, I64, Kernel
from folovllm.worker_proc.kernels.cpu.team import Team

_SIZES: Final = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24)  # of a tile, in vectors of rows
MAX_VECTORS: Final = _SIZES[-1]  # 384 rows share what it costs to pack values
_PACKING: Final = 1.3  # what packing keys and values costs a tile, in vectors of rows
_PLENTY: Final = 4  # so many of the largest tiles for each thread are divided well enough
_LOWEST: Final = -1e30
_LOG2_E: Final = 1.4426950408889634
_ELEMENT_BYTES: Final = 2
_ARCH_PRCTL: Final = 158  # number of the system call on x86-64
_ARCH_REQ_XCOMP_PERM: Final = 0x1023
_XTILEDATA: Final = 18
_WORDS: Final = ir.VectorType(I32, LANES)

# What the compiled function is given: int64 numbers, addresses in bytes.
(
    _QUERY,
    _OUTPUT,
    _CACHE,
    _HEAD_BYTES,
    _QUERY_STRIDE,
    _TILES,
    _NUM_TILES,
    _COUNTER,
    _SCRATCH,
    _SCRATCH_BYTES,
    _THREAD_NUM,
) = range(11)
_NUM_ARGUMENTS: Final = 11

# A tile: int64 numbers.
(
    _HEAD,  # KV head
    _TOKEN,  # the chunk's first token in the step
    _FIRST,  # the tile's first row of the chunk's
    _VECTORS,  # rows / 16
    _LAST,  # the chunk's last row
    _CONTEXT,  # tokens before the chunk
    _BLOCKS,  # address of the request's row of the block table
) = range(7)
_TILE_FIELDS: Final = 7


class Chunk(NamedTuple):
    """Several new tokens of one request.

    Attributes:
        start: the first of them in the step.
        length: how many.
        context: tokens before them.
        request: row of the block table.
    """

    start: int
    length: int
    context: int
    request: int


def chunks_of(metadata: AttentionMetadata) -> list[Chunk]:
    """The requests of a step that do not decode."""
    found, start = [], metadata.num_decodes
    for request in range(metadata.num_decodes, len(metadata.query_lens)):
        length = metadata.query_lens[request]
        found.append(Chunk(start, length, metadata.seq_lens[request] - length, request))
        start += length
    return found


def allow_tiles() -> bool:
    """Asks the system for the use of AMX's registers in this process, as Linux wants it; whether it agrees."""
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0)


class ChunkAttention:
    """The compiled kernel of a shape."""

    def __init__(
        self, shape: HeadShape, team: Team, cache: CodeCache | None = None, *, form: Form | None = None
    ) -> None:
        """`cache`: where compiled code is kept; `form`: for tests and measurements, None takes the fastest."""
        features = llvm.get_host_cpu_features()
        self.shape = shape
        self.form = form or best_form(shape.kind, llvm.get_host_cpu_name(), features)
        if self.form is Form.AMX and not allow_tiles():
            self.form = Form.FLOATS
        self._team = team
        self._code = Compiled.by(cache, build_chunk_attention, shape, self.form, bool(features.get("avx512f")))

    def plan(self, metadata: AttentionMetadata, cache: torch.Tensor) -> "ChunkPlan":
        """What all layers of a step share.

        Args:
            metadata: the step's; requests after the first `num_decodes` are its chunks, of which it must have one.
            cache: [2, num_kv_heads, num_blocks, block_size, head_dim], one layer's (all have the same shape).
        """
        return ChunkPlan(self.shape, self._team, self._code, metadata, cache)


class ChunkPlan:
    """One step's chunks, cut into tiles."""

    def __init__(
        self,
        shape: HeadShape,
        team: Team,
        code: Compiled,
        metadata: AttentionMetadata,
        cache: torch.Tensor,
    ) -> None:
        self._shape, self._team, self._code = shape, team, code  # code goes when nobody holds it
        self._table = table = metadata.block_table
        self._tiles = cut_into_tiles(shape, chunks_of(metadata), team.num_threads)
        self._tiles[:, _BLOCKS] = table.data_ptr() + self._tiles[:, _BLOCKS] * table.stride(0) * table.itemsize
        per_thread = _Scratch(shape).num_bytes
        self._scratch = torch.empty(team.num_threads * per_thread, dtype=torch.uint8)
        self._counter: npt.NDArray[np.int64] = np.zeros(1, np.int64)
        arguments = np.zeros(_NUM_ARGUMENTS, np.int64)
        arguments[_HEAD_BYTES] = cache.stride(1) * _ELEMENT_BYTES
        arguments[_TILES], arguments[_NUM_TILES] = self._tiles.ctypes.data, len(self._tiles)
        arguments[_COUNTER], arguments[_THREAD_NUM] = self._counter.ctypes.data, team.thread_num_address
        arguments[_SCRATCH], arguments[_SCRATCH_BYTES] = self._scratch.data_ptr(), per_thread
        self._arguments = arguments
        self._address = arguments.ctypes.data

    def attend(self, query: torch.Tensor, cache: torch.Tensor, output: torch.Tensor) -> None:
        """[T, Hq, D] of all of the step's tokens and one layer's cache; fills the chunks' rows of `output` [T, Hq · D].

        Each token's heads must lie one after another in `query`; K and V of the new tokens are in the cache.
        """
        if query.stride()[1:] != (self._shape.head_dim, 1):
            query = query.contiguous()
        arguments = self._arguments
        arguments[_QUERY], arguments[_QUERY_STRIDE] = query.data_ptr(), query.stride(0)
        arguments[_OUTPUT], arguments[_CACHE] = output.data_ptr(), cache.data_ptr()
        self._counter[0] = 0
        self._team.run(self._code.address, self._address)

    def for_layers(self, query: int, output: int, caches: npt.NDArray[np.int64]) -> tuple[int, npt.NDArray[np.int64]]:
        """See `decode_attention.DecodePlan.for_layers`; `query` and `output` are those of all of the step's tokens."""
        arguments = np.tile(self._arguments, (len(caches), 1))
        shape = self._shape
        self._counter = np.zeros(len(caches), np.int64)
        arguments[:, _QUERY], arguments[:, _OUTPUT], arguments[:, _CACHE] = query, output, caches
        arguments[:, _QUERY_STRIDE] = shape.num_kv_heads * shape.group * shape.head_dim
        arguments[:, _COUNTER] = self._counter.ctypes.data + self._counter.itemsize * np.arange(len(caches))
        return self._code.address, arguments


def cut_into_tiles(shape: HeadShape, chunks: Sequence[Chunk], num_threads: int) -> npt.NDArray[np.int64]:
    """[N, 7] tiles, the costliest first; _BLOCKS is a row of the block table still."""
    vectors = [-(-chunk.length * shape.group // LANES) for chunk in chunks]  # of one head
    if sum(vectors) * shape.num_kv_heads >= _PLENTY * MAX_VECTORS * num_threads:
        return _cut(shape, chunks, MAX_VECTORS)[0]
    cuts = (_cut(shape, chunks, size) for size in _SIZES if size < 2 * max(vectors))
    return min(cuts, key=lambda cut: _time(cut[1], num_threads))[0]


def _cut(shape: HeadShape, chunks: Sequence[Chunk], size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Tiles of at most `size` vectors, and what they cost, in descending order."""
    found = []
    for chunk in chunks:
        num_rows = chunk.length * shape.group
        vectors = -(-num_rows // LANES)
        for first in range(0, vectors, size):
            count = min(size, vectors - first)
            rows = (chunk.start, first * LANES, count, num_rows - 1, chunk.context, chunk.request)
            found += [(head, *rows) for head in range(shape.num_kv_heads)]
    cut = np.array(found, np.int64)
    seen = cut[:, _CONTEXT] + (cut[:, _FIRST] + cut[:, _VECTORS] * LANES) // shape.group
    costs = seen * (cut[:, _VECTORS] + _PACKING)
    order = np.argsort(-costs, kind="stable")
    return np.ascontiguousarray(cut[order]), costs[order]


def _time(costs: npt.NDArray[np.float64], num_threads: int) -> float:
    """When the last thread is done, if each takes the next tile as soon as it is free."""
    threads = [0.0] * num_threads
    for cost in costs.tolist():
        heapq.heapreplace(threads, threads[0] + cost)
    return max(threads)


class _Scratch:
    """Where a thread's areas begin, in bytes from its part of the scratch."""

    def __init__(self, shape: HeadShape) -> None:
        sizes = {
            "queries": MAX_VECTORS * shape.head_dim * VECTOR_BYTES,
            "outputs": MAX_VECTORS * shape.head_dim * VECTOR_BYTES,
            "scores": 2 * KEYS * VECTOR_BYTES,
            "weights": KEYS * VECTOR_BYTES,
            "keys": KEYS * shape.head_dim * 4,
            "values": KEYS * shape.head_dim * 4,
            "peaks": MAX_VECTORS * VECTOR_BYTES,
            "sums": MAX_VECTORS * VECTOR_BYTES,
            "limits": MAX_VECTORS * VECTOR_BYTES,
            "subs": 2 * KEYS // SUB * 8,
            "tile_shapes": 128,
            "nowhere": shape.head_dim * 4,
        }
        self.places: dict[str, int] = {}
        self.num_bytes = 0
        for name, size in sizes.items():
            self.places[name] = self.num_bytes
            self.num_bytes += -(-size // 64) * 64


def build_chunk_attention(shape: HeadShape, form: Form, wide: bool) -> Kernel:

    kernel = Kernel("chunk_attention")
    thread = kernel.call_int(kernel.argument(_THREAD_NUM))
    base = kernel.sum(kernel.argument(_SCRATCH), kernel.product(thread, kernel.argument(_SCRATCH_BYTES)))
    places = _Scratch(shape).places
    areas = {name: kernel.sum(base, kernel.integer(place)) for name, place in places.items()}
    with (
        tiles(kernel, form, areas["tile_shapes"]),
        kernel.tickets(kernel.argument(_COUNTER), kernel.argument(_NUM_TILES)) as tile,
    ):
        _Tile(kernel, shape, form, tile, areas, wide=wide).emit()
    return kernel


class _Tile:
    """The code for one tile."""

    def __init__(
        self, kernel: Kernel, shape: HeadShape, form: Form, tile: Any, areas: dict[str, Any], *, wide: bool
    ) -> None:
        self.k, self.shape, self.area = kernel, shape, areas
        named = {field.name: areas[field.name] for field in dataclasses.fields(Areas)}
        self.products = make_products(form, kernel, Areas(**named), shape.head_dim, shape.kind, wide=wide)
        k = kernel
        field = k.product(tile, k.integer(_TILE_FIELDS))

        def of_tile(index: int) -> Any:
            return k.load(k.argument(_TILES), k.sum(field, k.integer(index)), I64)

        self.head, self.token, self.first = of_tile(_HEAD), of_tile(_TOKEN), of_tile(_FIRST)
        self.num_vectors, self.last, self.context = of_tile(_VECTORS), of_tile(_LAST), of_tile(_CONTEXT)
        self.blocks = of_tile(_BLOCKS)
        group = k.integer(shape.group)
        past = k.sum(self.first, k.product(self.num_vectors, k.integer(LANES)))
        last = k.smaller(k.builder.sub(past, k.integer(1)), self.last)
        self.seen_by_all = k.sum(self.context, k.builder.sdiv(self.first, group), k.integer(1))
        self.end = k.sum(self.context, k.builder.sdiv(last, group), k.integer(1))  # keys that any row may see
        heads = k.integer(shape.num_kv_heads)
        self.keys = k.sum(k.argument(_CACHE), k.product(self.head, k.argument(_HEAD_BYTES)))
        self.values = k.sum(self.keys, k.product(heads, k.argument(_HEAD_BYTES)))
        self.factor = k.constant(_LOG2_E / math.sqrt(shape.head_dim), LANES)

    def emit(self) -> None:
        k = self.k
        with k.loop(k.integer(0), self.num_vectors) as vector:
            self.begin(vector)
        num_parts = k.builder.sdiv(k.sum(self.end, k.integer(KEYS - 1)), k.integer(KEYS))
        with k.loop(k.integer(0), num_parts) as part:
            self.meet_keys(k.product(part, k.integer(KEYS)))
        with k.loop(k.integer(0), self.num_vectors) as vector:
            self.write_output(vector)

    def begin(self, vector: Any) -> None:
        """Packs sixteen rows; rows past the last are that one again."""
        k = self.k
        rows = [self.k.smaller(row, self.last) for row in self.rows(vector)]
        self.products.pack_queries(vector, [self.place(row, k.argument(_QUERY_STRIDE)) for row in rows], self.query)
        limits = ir.Constant(_WORDS, ir.Undefined)
        for lane, row in enumerate(rows):
            token = k.builder.sdiv(row, k.integer(self.shape.group))
            limit = k.builder.trunc(k.sum(self.context, token, k.integer(1)), I32)
            limits = k.builder.insert_element(limits, limit, ir.Constant(I32, lane))
        place = k.product(vector, k.integer(LANES))
        k.store(limits, self.area["limits"], place, I32, LANES)
        k.store(k.constant(_LOWEST, LANES), self.area["peaks"], place, F32, LANES)
        k.store(k.constant(0.0, LANES), self.area["sums"], place, F32, LANES)
        start = k.product(vector, k.integer(self.shape.head_dim * LANES))
        with k.loop(k.integer(0), k.integer(self.shape.head_dim)) as number:
            at = k.sum(start, k.product(number, k.integer(LANES)))
            k.store(k.constant(0.0, LANES), self.area["outputs"], at, F32, LANES)

    @property
    def query(self) -> Any:
        return self.k.argument(_QUERY)

    def rows(self, vector: Any) -> list[Any]:
        start = self.k.sum(self.first, self.k.product(vector, self.k.integer(LANES)))
        return [self.k.sum(start, self.k.integer(lane)) for lane in range(LANES)]

    def place(self, row: Any, stride: Any) -> Any:
        """First element of a row in queries or outputs whose tokens are `stride` elements apart."""
        k, group = self.k, self.k.integer(self.shape.group)
        token, member = k.builder.sdiv(row, group), k.builder.srem(row, group)
        head = k.sum(k.product(self.head, group), member)
        return k.sum(k.product(k.sum(self.token, token), stride), k.product(head, k.integer(self.shape.head_dim)))

    def meet_keys(self, first: Any) -> None:
        """All rows of the tile with keys `first` to `first` + 127, as far as they may see them."""
        k = self.k
        num_keys = self.k.smaller(k.builder.sub(self.end, first), k.integer(KEYS))
        num_subs = k.builder.lshr(k.sum(num_keys, k.integer(SUB - 1)), k.integer(4))
        last = k.builder.sub(self.end, k.integer(1))
        with k.loop(k.integer(0), k.integer(2 * KEYS // SUB)) as sub:  # those of the next 128 keys are fetched ahead
            key = k.smaller(k.sum(first, k.product(sub, k.integer(SUB))), k.builder.and_(last, k.integer(-SUB)))
            size = k.integer(self.shape.block_size)
            block = k.load(self.blocks, k.builder.udiv(key, size), I64)
            token = k.sum(k.product(block, size), k.builder.urem(key, size))
            k.store(k.product(token, k.integer(self.shape.head_dim)), self.area["subs"], sub, I64)
        self.products.pack_block((self.keys, self.values), num_subs, num_keys)
        strips = k.builder.lshr(self.num_vectors, k.integer(1))
        with k.loop(k.integer(0), strips) as strip:
            self.meet_strip(k.product(strip, k.integer(2)), 2, first)
        with k.when(k.builder.trunc(self.num_vectors, ir.IntType(1))):
            self.meet_strip(k.builder.sub(self.num_vectors, k.integer(1)), 1, first)

    def meet_strip(self, vector: Any, width: int, first: Any) -> None:
        """One or two vectors with as many of the keys as any of their rows may see."""
        k = self.k
        past = k.sum(self.first, k.product(k.sum(vector, k.integer(width)), k.integer(LANES)))
        last = k.smaller(k.builder.sub(past, k.integer(1)), self.last)
        end = k.sum(self.context, k.builder.sdiv(last, k.integer(self.shape.group)), k.integer(1))
        num_keys = k.smaller(k.builder.sub(end, first), k.integer(KEYS))
        with k.when(k.builder.icmp_signed(">", num_keys, k.integer(0))):
            num_subs = k.builder.lshr(k.sum(num_keys, k.integer(SUB - 1)), k.integer(4))
            num_paired = k.builder.lshr(k.sum(num_keys, k.integer(PAIRED - 1)), k.integer(5))
            self.products.scores(vector, width, self.keys, num_subs)
            for each in range(width):
                self.weigh(k.sum(vector, k.integer(each)), each, first, k.product(num_paired, k.integer(PAIRED)))
            self.products.add_values(vector, width, num_paired)

    def weigh(self, vector: Any, strip: int, first: Any, num_keys: Any) -> None:
        """Scores become weights; what the vector has seen so far is scaled to a new largest score."""
        k = self.k
        start = strip * KEYS * LANES
        with k.when(k.builder.icmp_signed(">", k.sum(first, num_keys), self.seen_by_all)):
            self.hide_future(vector, start, first, num_keys)
        place = k.product(vector, k.integer(LANES))
        before = k.load(self.area["peaks"], place, F32, LANES)

        def larger(index: Any, peaks: Sequence[Any]) -> list[Any]:
            at = [k.sum(k.product(index, k.integer(8 * LANES)), k.integer(start + each * LANES)) for each in range(8)]
            scores = [k.load(self.area["scores"], each, F32, LANES) for each in at]
            return [k.larger(k.larger(scores[i], scores[i + 4]), peaks[i]) for i in range(4)]

        peaks = k.fold(k.builder.lshr(num_keys, k.integer(3)), [before] * 4, larger)
        peak = k.larger(k.larger(peaks[0], peaks[1]), k.larger(peaks[2], peaks[3]))
        with k.when(self.is_any(k.builder.fcmp_ordered(">", peak, before))):
            self.scale(vector, k.exp2(k.times(k.builder.fsub(before, peak), self.factor), LANES))
        k.store(peak, self.area["peaks"], place, F32, LANES)
        shift = k.times(peak, self.factor)

        def weigh(index: Any, sums: Sequence[Any]) -> list[Any]:
            found = list(sums)
            for each in range(2):
                pair = k.sum(k.product(index, k.integer(2)), k.integer(each))
                weights = []
                for key in range(2):
                    row = k.sum(k.product(pair, k.integer(2 * LANES)), k.integer(start + key * LANES))
                    score = k.load(self.area["scores"], row, F32, LANES)
                    scaled = k.builder.fsub(k.times(score, self.factor), shift, flags=("contract",))
                    weights.append(k.exp2(scaled, LANES))
                    found[2 * each + key] = k.plus(found[2 * each + key], weights[-1])
                self.products.store_weights(strip, pair, weights)
            return found

        total = k.load(self.area["sums"], place, F32, LANES)
        nothing = k.constant(0.0, LANES)
        sums = k.fold(k.builder.lshr(num_keys, k.integer(2)), [total, nothing, nothing, nothing], weigh)
        k.store(k.plus(k.plus(sums[0], sums[1]), k.plus(sums[2], sums[3])), self.area["sums"], place, F32, LANES)

    def is_any(self, lanes: Any) -> Any:
        return self.k.builder.icmp_unsigned(
            "!=", self.k.builder.bitcast(lanes, ir.IntType(LANES)), ir.Constant(ir.IntType(LANES), 0)
        )

    def hide_future(self, vector: Any, start: int, first: Any, num_keys: Any) -> None:
        """Scores of keys that come after a row's own token, or after the chunk, are the lowest there are."""
        k = self.k
        limits = k.load(self.area["limits"], k.product(vector, k.integer(LANES)), I32, LANES)
        early = k.builder.sub(self.seen_by_all, first)
        early = k.builder.select(k.builder.icmp_signed("<", early, k.integer(0)), k.integer(0), early)
        with k.loop(early, num_keys) as key:
            number = k.builder.trunc(k.sum(first, key), I32)
            spread = k.builder.insert_element(ir.Constant(_WORDS, ir.Undefined), number, ir.Constant(I32, 0))
            zeros = ir.Constant(_WORDS, [ir.Constant(I32, 0)] * LANES)
            numbers = k.builder.shuffle_vector(spread, spread, zeros)
            at = k.sum(k.integer(start), k.product(key, k.integer(LANES)))
            visible = k.builder.icmp_signed("<", numbers, limits)
            score = k.load(self.area["scores"], at, F32, LANES)
            k.store(k.builder.select(visible, score, k.constant(_LOWEST, LANES)), self.area["scores"], at, F32, LANES)

    def scale(self, vector: Any, factor: Any) -> None:
        k = self.k
        place = k.product(vector, k.integer(LANES))
        total = k.load(self.area["sums"], place, F32, LANES)
        k.store(k.times(total, factor), self.area["sums"], place, F32, LANES)
        start = k.product(vector, k.integer(self.shape.head_dim * LANES))
        with k.loop(k.integer(0), k.integer(self.shape.head_dim)) as number:
            at = k.sum(start, k.product(number, k.integer(LANES)))
            output = k.load(self.area["outputs"], at, F32, LANES)
            k.store(k.times(output, factor), self.area["outputs"], at, F32, LANES)

    def write_output(self, vector: Any) -> None:
        """Divides by the sum of weights; rows past the last go nowhere."""
        k, shape = self.k, self.shape
        total = k.load(self.area["sums"], k.product(vector, k.integer(LANES)), F32, LANES)
        inverse = k.builder.fdiv(k.constant(1.0, LANES), total)
        start = k.product(vector, k.integer(shape.head_dim * LANES))
        width = k.integer(shape.num_kv_heads * shape.group * shape.head_dim)
        addresses = []
        for row in self.rows(vector):
            inside = k.builder.icmp_signed("<=", row, self.last)
            address = k.sum(k.argument(_OUTPUT), k.product(self.place(row, width), k.integer(_ELEMENT_BYTES)))
            addresses.append(k.builder.select(inside, address, self.area["nowhere"]))
        with k.loop(k.integer(0), k.integer(shape.head_dim // LANES)) as part:
            number = k.product(part, k.integer(LANES))
            columns = []
            for each in range(LANES):
                at = k.sum(start, k.product(k.sum(number, k.integer(each)), k.integer(LANES)))
                columns.append(k.times(k.load(self.area["outputs"], at, F32, LANES), inverse))
            for address, row in zip(addresses, k.transposed(columns), strict=True):
                k.store_floats(row, address, number, LANES, shape.kind)

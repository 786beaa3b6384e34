"""Attention of one query token per request, straight from the paged blocks. Reference: `attention.paged` (torch).

For each request and KV head: scores of the whole group of query heads, block by block, so that a key is read and
widened once for all of them; then softmax; then the values, weighted, block by block. Query vectors and outputs stay in
registers over a block. All sums are float32.

A long context is cut into parts of at most 256 tokens, which threads compute independently; whoever completes the last
part of a request and head joins them (flash-decoding, Dao et al., 2023). Without that one request's 3 KV heads keep the
second of two threads waiting for a third of the time. Where a request is cut depends on its own length alone, so it
comes out the same whatever else is in the step.

Idea and bound: keys and values must be read once from memory, which bounds a layer of 16 requests × 200 tokens at 9/3
heads of 64 by 100 µs (2.5 MB at 25 GB/s); gather and batched products in torch take 330.

A block's tokens past the request's end may hold anything (a former owner's numbers): their scores are overwritten
before they are looked at, and their values are never read.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir

from folovllm.worker_proc.kernels.cpu.code_cache import CodeCache
from folovllm.worker_proc.kernels.cpu.compiled import Compiled
from folovllm.worker_proc.kernels.cpu.llvm import COUNTER_LINE, F32, I64, Kernel, Sums, counters
from folovllm.worker_proc.kernels.cpu.team import Team

_LANES: Final = 16  # scores of so many tokens are one vector
_LOWEST: Final = -1e30
_FLOAT_BYTES: Final = 4
_ELEMENT_BYTES: Final = 2
_LINE_BYTES: Final = 64
_PART_TOKENS: Final = 256

# What the compiled function is given: int64 numbers, addresses in bytes.
(
    _QUERY,
    _OUTPUT,
    _CACHE,
    _HEAD_BYTES,
    _TABLE,
    _TABLE_WIDTH,
    _PARTS,
    _QUERY_STRIDE,
    _DRAWN,  # a counter for each thread, see `Kernel.drawn`
    _SCRATCH,
    _SCRATCH_BYTES,
    _JOINED,
    _COUNTERS,
    _THREAD_NUM,
    _NUM_THREADS,
    _TOTAL_PARTS,
) = range(16)
_NUM_ARGUMENTS: Final = 16

# A part of one request's and head's context: int64 numbers.
(
    _REQUEST,
    _HEAD,
    _BEGIN,  # its first token, that of a block
    _END,
    _PLACE,  # among all parts that are joined later
    _FIRST_PLACE,  # of the first part of the same request and head
    _NUM_PARTS,  # of the same request and head
    _COUNTER,  # of those that are done
) = range(8)
_PART_FIELDS: Final = 8


@dataclasses.dataclass(frozen=True)
class HeadShape:
    """What a kernel is compiled for.

    Attributes:
        num_kv_heads: KV heads.
        group: query heads of each.
        head_dim: numbers of a head.
        block_size: tokens in a block; a multiple of 16.
        kind: "bfloat16" or "float16", as the cache is stored.
    """

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    kind: str

    @property
    def is_supported(self) -> bool:
        """Whether there is a kernel of this shape: whole vectors of 16, and few enough for the registers."""
        fits = self.group * self.head_dim <= 1024 and self.head_dim in (32, 64, 96, 128, 256)
        return fits and self.block_size % _LANES == 0 and self.kind in ("bfloat16", "float16")


class DecodeAttention:
    """The compiled kernel of a shape."""

    def __init__(self, shape: HeadShape, team: Team, cache: CodeCache | None = None) -> None:
        self.shape = shape
        self._team = team
        self._code = Compiled.by(cache, build_decode_attention, shape)

    def plan(self, block_table: torch.Tensor, seq_lens: Sequence[int], cache: torch.Tensor) -> "DecodePlan":
        """What all layers of a step share.

        Args:
            block_table: int64 [R, W], rows contiguous.
            seq_lens: [R] tokens of each request, the new one included.
            cache: [2, num_kv_heads, num_blocks, block_size, head_dim], one layer's (all have the same shape).
        """
        return DecodePlan(self.shape, self._team, self._code, block_table, seq_lens, cache)


class DecodePlan:
    """One step's requests, divided among the threads."""

    def __init__(
        self,
        shape: HeadShape,
        team: Team,
        code: Compiled,
        block_table: torch.Tensor,
        seq_lens: Sequence[int],
        cache: torch.Tensor,
    ) -> None:
        self._shape, self._team, self._code = shape, team, code  # code goes when nobody holds it
        self._table = block_table
        self._parts = cut_into_parts(shape, np.array(seq_lens, np.int64))
        self._drawn = counters(team.num_threads)
        per_thread = shape.group * (max(_PART_TOKENS, shape.block_size) + 2 * shape.head_dim)
        self._scratch = torch.empty(team.num_threads, per_thread, dtype=torch.float32)
        num_joined = int(self._parts[-1, _FIRST_PLACE] + self._parts[-1, _NUM_PARTS])
        self._joined = torch.empty(num_joined, shape.group * (shape.head_dim + 2), dtype=torch.float32)
        self._counters: npt.NDArray[np.int64] = np.zeros(len(seq_lens) * shape.num_kv_heads, np.int64)
        arguments = np.zeros(_NUM_ARGUMENTS, np.int64)
        arguments[_HEAD_BYTES] = cache.stride(1) * _ELEMENT_BYTES
        arguments[_TABLE], arguments[_TABLE_WIDTH] = block_table.data_ptr(), block_table.stride(0)
        arguments[_PARTS], arguments[_TOTAL_PARTS] = self._parts.ctypes.data, len(self._parts)
        arguments[_DRAWN] = self._drawn.ctypes.data
        arguments[_SCRATCH], arguments[_SCRATCH_BYTES] = self._scratch.data_ptr(), per_thread * _FLOAT_BYTES
        arguments[_JOINED], arguments[_COUNTERS] = self._joined.data_ptr(), self._counters.ctypes.data
        arguments[_THREAD_NUM], arguments[_NUM_THREADS] = team.thread_num_address, team.num_threads
        self._arguments = arguments
        self._address = arguments.ctypes.data

    def attend(self, query: torch.Tensor, cache: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
        """[R, Hq, D] (each row contiguous) and one layer's cache → [R, Hq · D], which is `output` if that is given."""
        shape = self._shape
        if output is None:
            output = query.new_empty(query.shape[0], shape.num_kv_heads * shape.group * shape.head_dim)
        if query.stride(2) != 1 or query.stride(1) != shape.head_dim:
            query = query.contiguous()
        arguments = self._arguments
        arguments[_QUERY], arguments[_QUERY_STRIDE] = query.data_ptr(), query.stride(0)
        arguments[_OUTPUT], arguments[_CACHE] = output.data_ptr(), cache.data_ptr()
        self._drawn.fill(0)
        self._team.run(self._code.address, self._address)
        return output

    def for_layers(self, query: int, output: int, caches: npt.NDArray[np.int64]) -> tuple[int, npt.NDArray[np.int64]]:
        """For code that computes whole layers: the function, and what it is given in each of them [layers, fields].

        To be called by all threads of the team at once. `query` and `output` are addresses of [R, Hq · D] without gaps,
        `caches` [layers] those of the layers' caches.
        """
        arguments = np.tile(self._arguments, (len(caches), 1))
        shape = self._shape
        arguments[:, _QUERY], arguments[:, _OUTPUT], arguments[:, _CACHE] = query, output, caches
        arguments[:, _QUERY_STRIDE] = shape.num_kv_heads * shape.group * shape.head_dim
        threads = self._team.num_threads
        self._drawn = counters(len(caches) * threads)
        arguments[:, _DRAWN] = self._drawn.ctypes.data + np.arange(len(caches)) * (threads * COUNTER_LINE)
        return self._code.address, arguments


def cut_into_parts(shape: HeadShape, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[N, 8] parts of about equal size, whole blocks but for the last; requests in order, of each its heads."""
    heads, size = shape.num_kv_heads, shape.block_size
    most = max(_PART_TOKENS // size, 1)
    num_blocks = -(-lengths // size)
    blocks = -(-num_blocks // -(-num_blocks // most))  # of a part
    counts = -(-num_blocks // blocks)
    pairs = np.repeat(np.arange(len(lengths)), heads)  # the request of each pair of request and head
    of_pair = np.repeat(np.arange(len(pairs)), counts[pairs])
    firsts = np.cumsum(counts[pairs]) - counts[pairs]
    places = np.arange(len(of_pair))
    parts = np.empty((len(of_pair), _PART_FIELDS), np.int64)
    request = pairs[of_pair]
    parts[:, _REQUEST], parts[:, _HEAD], parts[:, _COUNTER] = request, of_pair % heads, of_pair
    parts[:, _BEGIN] = (places - firsts[of_pair]) * blocks[request] * size
    parts[:, _END] = np.minimum(parts[:, _BEGIN] + blocks[request] * size, lengths[request])
    parts[:, _PLACE], parts[:, _FIRST_PLACE] = places, firsts[of_pair]
    parts[:, _NUM_PARTS] = counts[request]
    return parts


def build_decode_attention(shape: HeadShape) -> Kernel:
    kernel = Kernel("decode_attention")
    thread = kernel.call_int(kernel.argument(_THREAD_NUM))
    scratch = kernel.sum(kernel.argument(_SCRATCH), kernel.product(thread, kernel.argument(_SCRATCH_BYTES)))
    team = thread, kernel.argument(_NUM_THREADS)
    with kernel.drawn(kernel.argument(_TOTAL_PARTS), kernel.argument(_DRAWN), team) as part:
        _Part(kernel, shape, part, scratch).emit()
    return kernel


class _Part:
    """The code for one part of the context of a request and KV head."""

    def __init__(self, kernel: Kernel, shape: HeadShape, part: Any, scratch: Any) -> None:
        self.k, self.shape = kernel, shape
        field = kernel.product(part, kernel.integer(_PART_FIELDS))
        fields = [
            kernel.load(kernel.argument(_PARTS), kernel.sum(field, kernel.integer(index)), I64)
            for index in range(_PART_FIELDS)
        ]
        self.request, self.head, self.begin, self.end, self.place, self.first_place, self.num_parts = fields[:-1]
        self.counter = kernel.sum(kernel.argument(_COUNTERS), kernel.product(fields[_COUNTER], kernel.integer(8)))
        size = shape.group * shape.head_dim * _FLOAT_BYTES
        self.query, self.output = scratch, kernel.sum(scratch, kernel.integer(size))
        self.scores = kernel.sum(scratch, kernel.integer(2 * size))
        block = kernel.integer(shape.block_size)
        self.length = kernel.builder.sub(self.end, self.begin)
        self.first_block = kernel.builder.sdiv(self.begin, block)
        self.num_full = kernel.builder.sdiv(self.length, block)
        self.num_blocks = kernel.builder.sdiv(kernel.sum(self.length, kernel.integer(shape.block_size - 1)), block)
        head_bytes = kernel.argument(_HEAD_BYTES)
        self.keys = kernel.sum(kernel.argument(_CACHE), kernel.product(self.head, head_bytes))
        heads = kernel.integer(shape.num_kv_heads)
        self.values = kernel.sum(self.keys, kernel.product(heads, head_bytes))
        self.row = kernel.sum(kernel.product(self.request, kernel.argument(_TABLE_WIDTH)), self.first_block)
        self.joined_bytes = shape.group * (shape.head_dim + 2) * _FLOAT_BYTES

    def emit(self) -> None:
        self._read_query()
        with self.k.loop(self.k.integer(0), self.num_blocks) as block:
            self._score_block(block)
        sums = [self._softmax(group) for group in range(self.shape.group)]
        with self.k.loop(self.k.integer(0), self.num_full) as block:
            base, first = self._block_base(block), self.k.product(block, self.k.integer(self.shape.block_size))
            with self.k.loop(self.k.integer(0), self.k.integer(self.shape.block_size // _LANES)) as part:
                start = self.k.product(part, self.k.integer(_LANES))
                self._add_values(base, first, start, _LANES)
        with self.k.loop(self.num_full, self.num_blocks) as block:  # once at most
            base, first = self._block_base(block), self.k.product(block, self.k.integer(self.shape.block_size))
            with self.k.loop(self.k.integer(0), self.k.builder.sub(self.length, first)) as token:
                self._add_values(base, first, token, 1)
        is_alone = self.k.builder.icmp_signed("==", self.num_parts, self.k.integer(1))
        with self.k.when(is_alone):
            self._write_output([self._output_of(group) for group in range(self.shape.group)])
        with self.k.when(self.k.builder.not_(is_alone)):
            self._hand_in(sums)

    def _read_query(self) -> None:
        """The group's query vectors as float32, divided by sqrt(head_dim); outputs begin at 0."""
        k, dim = self.k, self.shape.head_dim
        start = k.sum(
            k.product(self.request, k.argument(_QUERY_STRIDE)), k.product(self.head, k.integer(self._group_size))
        )
        for group in range(self.shape.group):
            vector = k.load_floats(k.argument(_QUERY), k.sum(start, k.integer(group * dim)), dim, self.shape.kind)
            scaled = k.times(vector, k.constant(1 / math.sqrt(dim), dim))
            k.store(scaled, self.query, k.integer(group * dim), F32, dim)
            k.store(k.constant(0.0, dim), self.output, k.integer(group * dim), F32, dim)

    @property
    def _group_size(self) -> int:
        return self.shape.group * self.shape.head_dim

    def _block_base(self, block: Any) -> Any:
        """First element of a block among those of its head."""
        entry = self.k.load(self.k.argument(_TABLE), self.k.sum(self.row, block), I64)
        return self.k.product(entry, self.k.integer(self.shape.block_size * self.shape.head_dim))

    def _score_block(self, block: Any) -> None:
        k, dim, group = self.k, self.shape.head_dim, self.shape.group
        base, first = self._block_base(block), k.product(block, k.integer(self.shape.block_size))
        following = self._block_base(
            k.smaller(k.sum(block, k.integer(1)), k.builder.sub(self.num_blocks, k.integer(1)))
        )
        with k.loop(k.integer(0), k.integer(self.shape.block_size // _LANES)) as part:
            start = k.product(part, k.integer(_LANES))
            queries = [k.load(self.query, k.integer(each * dim), F32, dim) for each in range(group)]
            sums = [Sums(k, _LANES) for _ in range(group)]
            for token in range(_LANES):
                place = k.product(k.sum(start, k.integer(token)), k.integer(dim))
                self._prefetch_row(self.keys, k.sum(following, place))
                self._prefetch_row(self.values, k.sum(base, place))
                key = k.load_floats(self.keys, k.sum(base, place), dim, self.shape.kind)
                for each in range(group):
                    sums[each].add(k.folded(k.times(queries[each], key), dim, _LANES))
            for each in range(group):
                k.store(sums[each].result(), self.scores, k.sum(self._scores_of(each), first, start), F32, _LANES)

    def _prefetch_row(self, address: Any, start: Any) -> None:
        """Blocks lie anywhere, so the processor does not foresee the next one; values are needed after all scores."""
        k = self.k
        row = k.sum(address, k.product(start, k.integer(_ELEMENT_BYTES)))
        for line in range(0, self.shape.head_dim * _ELEMENT_BYTES, _LINE_BYTES):
            k.prefetch(k.sum(row, k.integer(line)))

    def _scores_of(self, group: int) -> Any:
        return self.k.integer(group * max(_PART_TOKENS, self.shape.block_size))

    def _softmax(self, group: int) -> tuple[Any, Any]:
        """Weights that add up to 1, in place of the scores; 0 or nearly so past the end.

        Returns:
            The largest score, and the sum of the weights before they were divided by it.
        """
        k = self.k
        start = self._scores_of(group)
        padded = k.product(self.num_blocks, k.integer(self.shape.block_size))
        with k.loop(self.length, padded) as token:
            k.store(_number(_LOWEST), self.scores, k.sum(start, token), F32)
        num_parts = k.builder.sdiv(padded, k.integer(_LANES))
        lanes = self._accumulate(k.constant(_LOWEST, _LANES), num_parts, start, self._larger)
        largest = k.largest(lanes, _LANES)
        peak = k.spread(largest, _LANES)
        weights = self._accumulate(
            k.constant(0.0, _LANES),
            num_parts,
            start,
            lambda so_far, score, place: self._weigh(so_far, score, place, peak),
        )
        total = k.total(weights, _LANES)
        inverse = k.builder.fdiv(_number(1.0), total)
        with k.loop(k.integer(0), num_parts) as part:
            place = k.sum(start, k.product(part, k.integer(_LANES)))
            weight = k.times(k.load(self.scores, place, F32, _LANES), k.spread(inverse, _LANES))
            k.store(weight, self.scores, place, F32, _LANES)
        return largest, total

    def _larger(self, so_far: Any, score: Any, _place: Any) -> Any:
        return self.k.larger(score, so_far)

    def _weigh(self, so_far: Any, score: Any, place: Any, peak: Any) -> Any:
        weight = self.k.exp(self.k.builder.fsub(score, peak), _LANES)
        self.k.store(weight, self.scores, place, F32, _LANES)
        return self.k.plus(so_far, weight)

    def _accumulate(self, initial: Any, num_parts: Any, start: Any, step: Any) -> Any:
        """`step(so far, 16 scores, their place)` over all scores; what is carried lies in a stack slot."""
        k = self.k
        with k.builder.goto_entry_block():
            slot = k.builder.alloca(initial.type)
        k.builder.store(initial, slot)
        with k.loop(k.integer(0), num_parts) as part:
            place = k.sum(start, k.product(part, k.integer(_LANES)))
            k.builder.store(step(k.builder.load(slot), k.load(self.scores, place, F32, _LANES), place), slot)
        return k.builder.load(slot)

    def _add_values(self, base: Any, first: Any, start: Any, count: int) -> None:
        """Adds `count` weighted values to the outputs, which are read and written once."""
        k, dim, group = self.k, self.shape.head_dim, self.shape.group
        outputs = [k.load(self.output, k.integer(each * dim), F32, dim) for each in range(group)]
        for token in range(count):
            place = k.sum(start, k.integer(token))
            value = k.load_floats(self.values, k.sum(base, k.product(place, k.integer(dim))), dim, self.shape.kind)
            for each in range(group):
                weight = k.load(self.scores, k.sum(self._scores_of(each), first, place), F32)
                outputs[each] = k.plus(outputs[each], k.times(k.spread(weight, dim), value))
        for each in range(group):
            k.store(outputs[each], self.output, k.integer(each * dim), F32, dim)

    def _output_of(self, group: int) -> Any:
        return self.k.load(self.output, self.k.integer(group * self.shape.head_dim), F32, self.shape.head_dim)

    def _write_output(self, vectors: Sequence[Any]) -> None:
        k, dim = self.k, self.shape.head_dim
        width = self.shape.num_kv_heads * self._group_size
        start = k.sum(k.product(self.request, k.integer(width)), k.product(self.head, k.integer(self._group_size)))
        for group, vector in enumerate(vectors):
            k.store_floats(vector, k.argument(_OUTPUT), k.sum(start, k.integer(group * dim)), dim, self.shape.kind)

    def _hand_in(self, sums: Sequence[tuple[Any, Any]]) -> None:
        """Leaves the part's result, and its largest scores and sums, where they are joined by whoever is last."""
        k, dim, group = self.k, self.shape.head_dim, self.shape.group
        place = self._joined(self.place)
        for each, (largest, total) in enumerate(sums):
            k.store(self._output_of(each), place, k.integer(each * dim), F32, dim)
            k.store(largest, place, k.integer(group * dim + 2 * each), F32)
            k.store(total, place, k.integer(group * dim + 2 * each + 1), F32)
        counter = k.builder.inttoptr(self.counter, I64.as_pointer())
        done = k.builder.atomic_rmw("add", counter, k.integer(1), "acq_rel")
        last = k.builder.sub(self.num_parts, k.integer(1))
        with k.when(k.builder.icmp_signed("==", done, last)):
            k.store(k.integer(0), self.counter, k.integer(0), I64)  # for the next layer
            self._write_output([self._join(each) for each in range(group)])

    def _joined(self, place: Any) -> Any:
        return self.k.sum(self.k.argument(_JOINED), self.k.product(place, self.k.integer(self.joined_bytes)))

    def _join(self, group: int) -> Any:
        """The parts' results, each weighted by its sum, brought to the largest score of all."""
        k, dim = self.k, self.shape.head_dim
        sums = self.shape.group * dim + 2 * group

        def larger(part: Any, so_far: Sequence[Any]) -> list[Any]:
            return [k.larger(k.load(self._joined(k.sum(self.first_place, part)), k.integer(sums), F32), so_far[0])]

        (peak,) = k.fold(self.num_parts, [_number(_LOWEST)], larger)

        def add(part: Any, so_far: Sequence[Any]) -> list[Any]:
            place = self._joined(k.sum(self.first_place, part))
            below = k.builder.fsub(k.load(place, k.integer(sums), F32), peak)
            scale = k.builder.extract_element(k.exp(k.spread(below, _LANES), _LANES), ir.Constant(ir.IntType(32), 0))
            weight = k.builder.fmul(scale, k.load(place, k.integer(sums + 1), F32))
            result = k.load(place, k.integer(group * dim), F32, dim)
            return [k.plus(so_far[0], k.times(k.spread(weight, dim), result)), k.builder.fadd(so_far[1], weight)]

        joined, total = k.fold(self.num_parts, [k.constant(0.0, dim), _number(0.0)], add)
        return k.builder.fdiv(joined, k.spread(total, dim))


def _number(value: float) -> Any:
    return ir.Constant(F32, value)

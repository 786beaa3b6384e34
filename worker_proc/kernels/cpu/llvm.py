"""The words that kernels are written in: a description in LLVM's intermediate representation, which `compiled` takes.

Why not a compiler for Python functions: vectors are what these kernels are about, and a loop over numbers becomes the
vectors one wants only sometimes (numba: 52 ns for a key and three queries of 64, this: 9). Here a vector
is a value like any other: `<64 x float>` is cut by LLVM into the registers that the processor has, 512, 256 or 128 bits
wide. llvmlite is loaded in some 30 ms and compiles a kernel in 0.3 to 1.4 s, the more the larger a group of heads is.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
from llvmlite import ir

I8: Final = ir.IntType(8)
I16: Final = ir.IntType(16)
I32: Final = ir.IntType(32)
I64: Final = ir.IntType(64)
F32: Final = ir.FloatType()
HALF: Final = ir.HalfType()


class _BFloat(ir.types.Type):  # type: ignore[misc]  # llvmlite has no types; this one it does not know
    """LLVM's type for bf16, which processors that multiply such numbers name in their functions."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF16: Final = _BFloat()

COUNTER_LINE: Final = 64  # bytes: what two threads count in does not share a cache line
ENTRY: Final = "kernel"  # the function of every kernel
_CONTRACT: Final = ("contract",)  # a product and a sum may become one fused operation; nothing else is rearranged


class Kernel:
    """A function `void f(int64_t *arguments)` under construction, and its vocabulary.

    All addresses are int64 values in bytes; `offset` counts elements of what is loaded or stored.
    """

    def __init__(self, name: str) -> None:
        self.module = ir.Module(name)
        self._open(ir.Function(self.module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), ENTRY))

    def _open(self, function: Any) -> None:
        self.function = function
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))

    def argument(self, index: int) -> Any:
        """The `index`-th number of the array that the function is given."""
        return self.builder.load(self.builder.gep(self.function.args[0], [_i64(index)]))

    def inner(self, name: str, num_values: int) -> "Inner":
        """A function of this module's own, for `invoke`: `void name(int64_t, …)` with `num_values` numbers."""
        return Inner(self.module, name, num_values)

    def invoke(self, function: "Inner", *values: Any) -> None:
        self.builder.call(function.function, values)

    def integer(self, value: int) -> Any:
        return _i64(value)

    def sum(self, *values: Any) -> Any:
        total = values[0]
        for value in values[1:]:
            total = self.builder.add(total, value)
        return total

    def product(self, left: Any, right: Any) -> Any:
        return self.builder.mul(left, right)

    def share(self, count: Any, thread: Any, num_threads: Any) -> tuple[Any, Any]:
        """First and end of a thread's part of `count` pieces of work, for `loop`."""
        start = self.builder.sdiv(self.product(count, thread), num_threads)
        return start, self.builder.sdiv(self.product(count, self.sum(thread, _i64(1))), num_threads)

    @contextmanager
    def loop(self, start: Any, end: Any) -> Iterator[Any]:
        """Runs its body for every integer from `start` to `end` - 1, which it yields."""
        builder = self.builder
        before = builder.block
        head, body, after = (self.function.append_basic_block(part) for part in ("head", "body", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(I64)
        index.add_incoming(start, before)
        builder.cbranch(builder.icmp_signed("<", index, end), body, after)
        builder.position_at_end(body)
        yield index
        index.add_incoming(builder.add(index, _i64(1)), builder.block)
        builder.branch(head)
        builder.position_at_end(after)

    @contextmanager
    def tickets(self, counter: Any, count: Any) -> Iterator[Any]:
        """Runs its body for one integer below `count` after another, drawn from the int64 at address `counter`.

        Threads that draw from the same counter share the integers among them: whoever is done first takes the next.
        """
        builder = self.builder
        head, body, after = (self.function.append_basic_block(part) for part in ("head", "body", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        ticket = builder.atomic_rmw("add", self._pointer(counter, _i64(0), I64, 1), _i64(1), "monotonic")
        builder.cbranch(builder.icmp_signed("<", ticket, count), body, after)
        builder.position_at_end(body)
        yield ticket
        builder.branch(head)
        builder.position_at_end(after)

    @contextmanager
    def drawn(self, count: Any, counters: Any, team: tuple[Any, Any]) -> Iterator[Any]:
        """Runs its body for one integer below `count` after another, shared among the threads as each gets on.

        A thread begins with its own share, in order, and then helps the others with theirs. So each reads what lies
        together, and none waits for one whose core has something else to do as well. A draw from one's own share costs
        some 10 ns: nobody else touches that counter until the end.

        Args:
            count: how many.
            counters: address of an int64 for each thread, `COUNTER_LINE` bytes apart, all 0 at first.
            team: (this thread, number of threads).
        """
        thread, num_threads = team
        with self.loop(self.integer(0), num_threads) as turn:
            whose = self.builder.srem(self.sum(thread, turn), num_threads)
            first, end = self.share(count, whose, num_threads)
            counter = self.sum(counters, self.product(whose, self.integer(COUNTER_LINE)))
            with self.tickets(counter, self.builder.sub(end, first)) as ticket:
                yield self.sum(first, ticket)

    @contextmanager
    def when(self, condition: Any) -> Iterator[None]:
        """Runs its body if the condition (i1) holds."""
        body, after = (self.function.append_basic_block(part) for part in ("body", "after"))
        self.builder.cbranch(condition, body, after)
        self.builder.position_at_end(body)
        yield
        self.builder.branch(after)
        self.builder.position_at_end(after)

    def fold(
        self, end: Any, initial: Sequence[Any], step: Callable[[Any, Sequence[Any]], Sequence[Any]]
    ) -> Sequence[Any]:
        """What `step(index, values)` makes of `initial` for each integer from 0 to `end` - 1 in turn."""
        builder = self.builder
        before = builder.block
        head, body, after = (self.function.append_basic_block(part) for part in ("head", "body", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        index, carried = builder.phi(I64), [builder.phi(value.type) for value in initial]
        for phi, value in zip([index, *carried], [_i64(0), *initial], strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", index, end), body, after)
        builder.position_at_end(body)
        results = step(index, carried)
        following = builder.add(index, _i64(1))
        for phi, value in zip([index, *carried], [following, *results], strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return carried

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """What LLVM's intrinsic function `name` returns, of type `result`."""
        kinds = [argument.type for argument in arguments]
        declared = self.module.globals.get(name)
        function = declared or ir.Function(self.module, ir.FunctionType(result, kinds), name)
        return self.builder.call(function, arguments)

    def call_int(self, address: Any) -> Any:
        """What the C function `int f(void)` at `address` returns, as int64."""
        pointer = self.builder.inttoptr(address, ir.FunctionType(I32, []).as_pointer())
        return self.builder.sext(self.builder.call(pointer, []), I64)

    def call_void(self, address: Any, *values: Any) -> None:
        """Calls the C function `void f(int64_t, …)` at `address` (an address is such a number too)."""
        kind = ir.FunctionType(ir.VoidType(), [I64] * len(values))
        self.builder.call(self.builder.inttoptr(address, kind.as_pointer()), values)

    def variable(self, initial: Any) -> Any:
        """A place for a value that a loop carries, to be used with `get` and `set`; LLVM keeps it in a register."""
        with self.builder.goto_entry_block():
            place = self.builder.alloca(initial.type)
        self.builder.store(initial, place)
        return place

    def get(self, variable: Any) -> Any:
        return self.builder.load(variable)

    def set(self, variable: Any, value: Any) -> None:
        self.builder.store(value, variable)

    def prefetch(self, address: Any) -> None:
        """Asks for the cache line at `address`, which may lie anywhere."""
        hints = [ir.Constant(I32, hint) for hint in (0, 3, 1)]  # read, keep, data
        self.call("llvm.prefetch.p0", ir.VoidType(), self.builder.inttoptr(address, I8.as_pointer()), *hints)

    def load(self, address: Any, offset: Any, kind: Any, count: int = 1) -> Any:
        """`count` numbers of `kind` at `address`; one number for 1, else a vector."""
        return self.builder.load(self._pointer(address, offset, kind, count), align=_size(kind))

    def store(self, value: Any, address: Any, offset: Any, kind: Any, count: int = 1) -> None:
        self.builder.store(value, self._pointer(address, offset, kind, count), align=_size(kind))

    def _pointer(self, address: Any, offset: Any, kind: Any, count: int) -> Any:
        element = self.builder.gep(self.builder.inttoptr(address, kind.as_pointer()), [offset])
        return element if count == 1 else self.builder.bitcast(element, ir.VectorType(kind, count).as_pointer())

    def load_floats(self, address: Any, offset: Any, count: int, kind: str) -> Any:
        """<count x float> from numbers stored as "bfloat16", "float16" or "float32"."""
        if kind == "float32":
            return self.load(address, offset, F32, count)
        if kind == "float16":
            return self.builder.fpext(self.load(address, offset, HALF, count), ir.VectorType(F32, count))
        wide = self.builder.zext(self.load(address, offset, I16, count), ir.VectorType(I32, count))
        return self.builder.bitcast(self.builder.shl(wide, _all(I32, 16, count)), ir.VectorType(F32, count))

    def store_floats(self, value: Any, address: Any, offset: Any, count: int, kind: str) -> None:
        """The inverse of `load_floats`, rounded to nearest, ties to even."""
        builder = self.builder
        if kind == "float32":
            self.store(value, address, offset, F32, count)
        elif kind == "float16":
            self.store(builder.fptrunc(value, ir.VectorType(HALF, count)), address, offset, HALF, count)
        elif _rounds_to_bf16():
            self.store(builder.fptrunc(value, ir.VectorType(BF16, count)), address, offset, BF16, count)
        else:
            bits = builder.bitcast(value, ir.VectorType(I32, count))
            odd = builder.and_(builder.lshr(bits, _all(I32, 16, count)), _all(I32, 1, count))
            rounded = builder.add(bits, builder.add(odd, _all(I32, 0x7FFF, count)))
            short = builder.trunc(builder.lshr(rounded, _all(I32, 16, count)), ir.VectorType(I16, count))
            self.store(short, address, offset, I16, count)

    def load_pairs(self, address: Any, offset: Any, count: int) -> tuple[Any, Any]:
        """The first and the second of each of `count` pairs of bfloat16 numbers: two vectors of `count` floats."""
        pairs, kind = self.load(address, offset, I32, count), ir.VectorType(F32, count)
        first = self.builder.shl(pairs, _all(I32, 16, count))
        second = self.builder.and_(pairs, _all(I32, 0xFFFF0000, count))
        return self.builder.bitcast(first, kind), self.builder.bitcast(second, kind)

    def constant(self, value: float, count: int) -> Any:
        return _all(F32, value, count)

    def times(self, left: Any, right: Any) -> Any:
        return self.builder.fmul(left, right, flags=_CONTRACT)

    def plus(self, left: Any, right: Any) -> Any:
        return self.builder.fadd(left, right, flags=_CONTRACT)

    def larger(self, left: Any, right: Any) -> Any:
        return self.builder.select(self.builder.fcmp_ordered(">", left, right), left, right)

    def smaller(self, left: Any, right: Any) -> Any:
        """The smaller of two integers."""
        return self.builder.select(self.builder.icmp_signed("<", left, right), left, right)

    def spread(self, number: Any, count: int) -> Any:
        """A vector of `count` times `number`, a float or a word."""
        empty = ir.Constant(ir.VectorType(number.type, count), ir.Undefined)
        first = self.builder.insert_element(empty, number, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, empty, _all(I32, 0, count))

    def interleaved(self, left: Any, right: Any, count: int) -> Any:
        """A vector of twice `count` numbers: left[0], right[0], left[1], right[1], ..."""
        mask = [ir.Constant(I32, place + half) for place in range(count) for half in (0, count)]
        return self.builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(I32, 2 * count), mask))

    def halves(self, vector: Any, count: int) -> tuple[Any, Any]:
        """The lower and the upper half of a vector of `count` numbers."""
        low, high = range(count // 2), range(count // 2, count)
        return self._pick(vector, vector, low), self._pick(vector, vector, high)

    def transposed(self, rows: Sequence[Any]) -> list[Any]:
        """The columns of a square of as many vectors of as many numbers; a power of two.

        Rows that are half the size apart swap their halves, then those a quarter apart their quarters, and so on.
        """
        count, distance = len(rows), len(rows) // 2
        square = list(rows)
        while distance:
            low = [place if not place & distance else place - distance + count for place in range(count)]
            high = [place + distance if not place & distance else place + count for place in range(count)]
            for first in (row for row in range(count) if not row & distance):
                pair = square[first], square[first + distance]
                square[first], square[first + distance] = self._pick(*pair, low), self._pick(*pair, high)
            distance //= 2
        return square

    def every_second(self, vector: Any, count: int, first: int) -> Any:
        """Half of a vector of `count` numbers: `first` (0 or 1), and every second one from there on."""
        return self._pick(vector, vector, range(first, count, 2))

    def folded(self, vector: Any, count: int, to: int) -> Any:
        """A vector of `count` numbers added up in halves until `to` are left."""
        while count > to:
            rest = count // 2 if count // 2 % to == 0 else count - to  # 48 to 16: the last 16 join the first
            low, high = self._pick(vector, vector, range(rest)), self._pick(vector, vector, range(rest, count))
            if rest > count - rest:
                high = self._pick(high, self.constant(0.0, count - rest), [*range(to), *([to] * (rest - to))])
            vector, count = self.plus(low, high), rest
        return vector

    def neighbours(self, left: Any, right: Any, count: int) -> Any:
        """Sums of neighbours of two vectors of `count` numbers, one vector after the other."""
        even, odd = range(0, 2 * count, 2), range(1, 2 * count, 2)
        return self.plus(self._pick(left, right, even), self._pick(left, right, odd))

    def total(self, vector: Any, count: int) -> Any:
        """The sum of a vector as one number."""
        return self.builder.extract_element(self.folded(vector, count, 1), ir.Constant(I32, 0))

    def largest(self, vector: Any, count: int) -> Any:
        """The largest number of a vector."""
        while count > 1:
            half = count // 2
            low, high = self._pick(vector, vector, range(half)), self._pick(vector, vector, range(half, count))
            vector, count = self.larger(low, high), half
        return self.builder.extract_element(vector, ir.Constant(I32, 0))

    def exp(self, x: Any, count: int) -> Any:
        """e to the power of each number, which must be ≤ 0: relative error below 2e-7; from -87 on the least normal.

        2 to the power of the nearest integer, put together from its bits, times a polynomial for what is left.
        """
        builder = self.builder
        scaled = self.larger(self.times(x, self.constant(_LOG2_E, count)), self.constant(-126.0, count))
        scaled = builder.select(builder.fcmp_unordered("uno", x, x), x, scaled)  # not a number stays so
        kind = ir.VectorType(F32, count)
        rint = f"llvm.rint.v{count}f32"
        function = self.module.globals.get(rint) or ir.Function(self.module, ir.FunctionType(kind, [kind]), rint)
        whole = builder.call(function, [scaled])
        rest = builder.fsub(scaled, whole)
        value = self.constant(_EXP2[-1], count)
        for coefficient in reversed(_EXP2[:-1]):
            value = self.plus(self.times(value, rest), self.constant(coefficient, count))
        bits = builder.add(builder.fptosi(whole, ir.VectorType(I32, count)), _all(I32, 127, count))
        return self.times(value, builder.bitcast(builder.shl(bits, _all(I32, 23, count)), kind))

    def exp2(self, x: Any, count: int) -> Any:
        """2 to the power of each number, which must be ≤ 0: relative error below 5e-6; from -125 on always the same.

        For weights that are rounded to 16 bits afterwards; what is not a number stays so. Nothing comes out below the
        least normal number: products with such take a hundred times as long (masked keys made a chunk twice as slow).
        """
        builder, kind, integers = self.builder, ir.VectorType(F32, count), ir.VectorType(I32, count)
        lowest = self.constant(-125.0, count)
        bounded = builder.select(builder.fcmp_ordered(">", lowest, x), lowest, x)
        whole = self.call(f"llvm.rint.v{count}f32", kind, bounded)
        rest = builder.fsub(bounded, whole)
        value = self.constant(_SHORT_EXP2[-1], count)
        for coefficient in reversed(_SHORT_EXP2[:-1]):
            value = self.plus(self.times(value, rest), self.constant(coefficient, count))
        exponent = builder.shl(builder.fptosi(whole, integers), _all(I32, 23, count))
        return builder.bitcast(builder.add(builder.bitcast(value, integers), exponent), kind)

    def root(self, number: Any) -> Any:
        """The square root of one number."""
        return self.call("llvm.sqrt.f32", F32, number)

    def _pick(self, left: Any, right: Any, places: Sequence[int]) -> Any:
        mask = ir.Constant(ir.VectorType(I32, len(places)), [ir.Constant(I32, place) for place in places])
        return self.builder.shuffle_vector(left, right, mask)


_LOG2_E: Final = 1.4426950408889634
_EXP2: Final = (
    1.0,
    0.6931471805599453,
    0.24022650695910072,
    0.05550410866482158,
    0.009618129107628477,
    0.0013333558146428443,
    0.00015403530393381608,
)
_SHORT_EXP2: Final = (
    1.0,  # exactly: what is scaled by 2 to the power of 0 stays what it is
    0.69312421,
    0.24024099,
    0.05590631,
    0.00958280,
)


class Inner(Kernel):
    """See `Kernel.inner`: its arguments are the numbers themselves. To be finished with `end`."""

    def __init__(self, module: Any, name: str, num_values: int) -> None:
        self.module = module
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * num_values), name)
        function.linkage = "internal"
        function.attributes.add("noinline")  # one copy of each serves all calls, and compiles in a fraction of the time
        self._open(function)

    def argument(self, index: int) -> Any:
        return self.function.args[index]

    def end(self) -> "Inner":
        self.builder.ret_void()
        return self


class Sums:
    """The sum of each of `count` vectors of `count` numbers, as one vector.

    Two vectors become one of sums of neighbours, again and again: `count` - 1 additions in all, where adding up each
    vector alone takes `count` · log2(count). Vectors are merged as soon as two have been merged equally often, so no
    more than log2(count) + 1 of them wait in registers.
    """

    def __init__(self, kernel: Kernel, count: int) -> None:
        self._kernel = kernel
        self._count = count
        self._waiting: list[tuple[int, Any]] = []  # (how often it was merged, vector)

    def add(self, vector: Any) -> None:
        """The next vector; its sum comes after those of the ones before."""
        merged = 0
        while self._waiting and self._waiting[-1][0] == merged:
            vector = self._kernel.neighbours(self._waiting.pop()[1], vector, self._count)
            merged += 1
        self._waiting.append((merged, vector))

    def result(self) -> Any:
        """The sums, once `count` vectors were added."""
        ((_, vector),) = self._waiting
        return vector


def counters(count: int) -> npt.NDArray[np.int64]:
    """So many counters for `Kernel.drawn`, each in a cache line of its own, all 0."""
    words = COUNTER_LINE // 8
    memory = np.zeros((count + 1) * words, np.int64)
    start = -memory.ctypes.data % COUNTER_LINE // 8
    return memory[start : start + count * words]


def _i64(value: int) -> Any:
    return ir.Constant(I64, value)


def _all(kind: Any, value: float, count: int) -> Any:
    return ir.Constant(ir.VectorType(kind, count), [ir.Constant(kind, value)] * count)


@functools.cache
def _rounds_to_bf16() -> bool:
    """Whether this processor does it itself (one instruction instead of five)."""
    return bool(llvm.get_host_cpu_features().get("avx512bf16"))


def _size(kind: Any) -> int:
    return {I8: 1, I16: 2, HALF: 2, BF16: 2, I32: 4, F32: 4, I64: 8}[kind]

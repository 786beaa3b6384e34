"""Where the threads of a call wait for each other: they spin, and let others run if it takes long.

A compiled step has seven barriers a layer, tens of microseconds apart. The team's own barrier puts a thread to sleep
after some 10 µs, as it must while nobody computes (see `common.config.child_environment`), and each time it takes tens
of microseconds to wake it. Inside a call the others are known to be at work, so that spinning wastes nothing. Where one
of them has lost its core to another process, whoever waits offers its own again and again.
"""

from typing import Final

from llvmlite import ir

from folovllm.worker_proc.kernels.cpu.llvm import I64, Inner, Kernel

COUNTER_BYTES: Final = 8
_SPINS: Final = 256  # looks at the counter, each a pause of 40 to 140 cycles, between two offers of the core


def barrier_function(kernel: Kernel) -> Inner:
    """`barrier(counter, number of threads, address of sched_yield)`; only for x86.

    The counter (int64, 0 at first, in a cache line of its own) counts arrivals and is never reset: the last thread of a
    round brings it to a multiple of the number of threads, and the others wait for that multiple or more.
    """
    f = kernel.inner("barrier", 3)
    builder = f.builder
    pointer = builder.inttoptr(f.argument(0), I64.as_pointer())
    threads = f.argument(1)
    before = builder.atomic_rmw("add", pointer, f.integer(1), "acq_rel")
    goal = f.product(f.sum(builder.sdiv(before, threads), f.integer(1)), threads)
    look, wait, offer, done = (f.function.append_basic_block(name) for name in ("look", "wait", "offer", "done"))
    spins = f.variable(f.integer(0))
    builder.branch(look)
    builder.position_at_end(look)
    count = builder.load_atomic(pointer, "acquire", COUNTER_BYTES)
    builder.cbranch(builder.icmp_signed(">=", count, goal), done, wait)
    builder.position_at_end(wait)
    f.call("llvm.x86.sse2.pause", ir.VoidType())
    so_far = f.sum(f.get(spins), f.integer(1))
    f.set(spins, so_far)
    is_long = builder.icmp_signed("==", builder.srem(so_far, f.integer(_SPINS)), f.integer(0))
    builder.cbranch(is_long, offer, look)
    builder.position_at_end(offer)
    _ = f.call_int(f.argument(2))
    builder.branch(look)
    builder.position_at_end(done)
    return f.end()

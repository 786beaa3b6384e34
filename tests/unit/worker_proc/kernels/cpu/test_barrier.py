"""No thread goes on before all have come, round after round, whoever is late."""

import numpy as np
import pytest
import torch

pytest.importorskip("llvmlite", reason="kernels for the CPU are compiled by llvmlite")

from folovllm.worker_proc.kernels.cpu.barrier import barrier_function
from folovllm.worker_proc.kernels.cpu.compiled import Compiled, prepare
from folovllm.worker_proc.kernels.cpu.llvm import I64, Kernel
from folovllm.worker_proc.kernels.cpu.team import Team, find_team

COUNTER, THREADS, YIELD, THREAD_NUM, ROUNDS, PLACES, SEEN, WORK = range(8)


@pytest.fixture(scope="module")
def team() -> Team:
    found = find_team()
    if found is None:
        pytest.skip("this torch does not use GNU's OpenMP")
    prepare()
    return found


def rounds_kernel() -> Kernel:
    """Each thread writes the round's number to its place, waits, adds up all places, and waits again."""
    k = Kernel("rounds")
    barrier = barrier_function(k)
    thread, threads = k.call_int(k.argument(THREAD_NUM)), k.argument(THREADS)
    waits = [k.argument(COUNTER), threads, k.argument(YIELD)]
    spent = k.variable(k.integer(1))
    with k.loop(k.integer(0), k.argument(ROUNDS)) as number:
        # One thread after another is late, by more than it takes to offer the core.
        is_late = k.builder.icmp_signed("==", k.builder.srem(number, threads), thread)
        with k.when(is_late), k.loop(k.integer(0), k.argument(WORK)) as each:
            k.set(spent, k.sum(k.product(k.get(spent), k.integer(3)), each))
        k.store(number, k.argument(PLACES), thread, I64)
        k.invoke(barrier, *waits)
        total = k.variable(k.integer(0))
        with k.loop(k.integer(0), threads) as other:
            k.set(total, k.sum(k.get(total), k.load(k.argument(PLACES), other, I64)))
        place = k.sum(k.product(thread, k.argument(ROUNDS)), number)
        k.store(k.get(total), k.argument(SEEN), place, I64)
        k.invoke(barrier, *waits)
    k.store(k.get(spent), k.argument(PLACES), k.sum(threads, thread), I64)  # so that the work is done at all
    return k


@pytest.mark.parametrize("work", [0, 100_000])
def test_all_have_come_before_one_goes_on(team: Team, work: int) -> None:
    rounds, threads = 50, team.num_threads
    code = Compiled(rounds_kernel())
    counter, places = torch.zeros(8, dtype=torch.int64), torch.zeros(2 * threads, dtype=torch.int64)
    seen = torch.full((threads, rounds), -1)
    arguments = np.zeros(8, np.int64)
    arguments[COUNTER], arguments[THREADS], arguments[YIELD] = counter.data_ptr(), threads, team.yield_address
    arguments[THREAD_NUM], arguments[ROUNDS], arguments[WORK] = team.thread_num_address, rounds, work
    arguments[PLACES], arguments[SEEN] = places.data_ptr(), seen.data_ptr()
    for _ in range(3):  # the counter goes on from call to call
        team.run(code.address, arguments.ctypes.data)
        assert torch.equal(seen, threads * torch.arange(rounds).expand(threads, -1))
    assert counter[0] == 3 * 2 * rounds * threads

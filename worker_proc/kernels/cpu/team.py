"""The threads that torch computes with, for kernels of our own: the same OpenMP team, so that the two never compete.

A team of its own would need a second thread for each core, and threads that have just finished one's work spin while
the other's begin. torch's wheels bring their OpenMP library along; `GOMP_parallel` of that very library runs a function
in every thread of the team that torch's operators use (about 3 µs for two threads that are still awake).
"""

import ctypes
import pathlib
from typing import Any

import torch


class Team:
    """Runs a compiled function in all threads of torch's team at once."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """`library`: GNU's OpenMP runtime, the copy that torch has loaded."""
        self._parallel: Any = library.GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._parallel.restype = None
        # With $OMP_THREAD_LIMIT a region gets fewer threads than it asks for, and a barrier would wait for the others.
        self.num_threads = min(torch.get_num_threads(), int(library.omp_get_thread_limit()))
        self.thread_num_address = _address(library.omp_get_thread_num)
        self.yield_address = _address(library.sched_yield)

    def run(self, function: int, arguments: int) -> None:
        """Calls the function at address `function` with the address `arguments` in every thread; waits for all."""
        self._parallel(function, arguments, self.num_threads, 0)


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None, "a function of a loaded library has an address"
    return address


def find_team() -> Team | None:
    """torch's team; None where this torch uses another runtime than GNU's."""
    folder = pathlib.Path(torch.__file__).parent / "lib"
    found = sorted(folder.glob("libgomp*.so*"))
    return Team(ctypes.CDLL(str(found[0]))) if found else None

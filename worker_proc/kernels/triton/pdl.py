"""Programmatic dependent launch: a kernel's start overlaps with the end of the one before it in the stream.

A kernel compiled with `DEPENDENT=True` and launched with `launch_options(True)` may begin while its predecessors still
run. Until it has called `wait` it may read nothing that any kernel of the same step writes: weights only, never
positions or activations. A dependent small kernel in a CUDA graph costs about 1.5 µs, of which this hides the launch.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_PREFETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")


def launch_options(dependent: bool) -> dict[str, bool]:
    """What a launch adds to its options; nothing off CUDA, where the option is not known."""
    return {"launch_pdl": True} if dependent else {}


@triton.jit
def let_next_begin(DEPENDENT: tl.constexpr):
    """Lets the next kernel begin once every program of this one is here; `wait` does so too, but after the loads."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def wait(DEPENDENT: tl.constexpr):
    """Lets the next kernel begin, then waits until the ones before are through and their writes visible."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch(pointers):
    """Asks the L2 cache for the lines that a tensor of pointers points to, without waiting; on CUDA only."""
    tl.inline_asm_elementwise(_PREFETCH, "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)

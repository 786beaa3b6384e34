"""`silu(gate) · up`. Reference: `layers.activation.silu_and_mul` without Triton."""

import torch
import triton
import triton.language as tl

from folovllm.worker_proc.kernels.triton.pdl import launch_options, wait

_COLUMNS = 1024


def silu_and_mul(gate_and_up: torch.Tensor, *, dependent: bool = False) -> torch.Tensor:
    """Contiguous [T, 2 · size], gate first → [T, size]; `dependent`: see `pdl`."""
    num_rows, size = gate_and_up.shape[0], gate_and_up.shape[1] // 2
    out = gate_and_up.new_empty(num_rows, size)
    _silu_and_mul[(num_rows, triton.cdiv(size, _COLUMNS))](
        gate_and_up, out, size, _COLUMNS, dependent, num_warps=4, **launch_options(dependent)
    )
    return out


@triton.jit
def _silu_and_mul(gate_ptr, out_ptr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr):
    wait(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < SIZE
    gate = tl.load(gate_ptr + row * 2 * SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + row * 2 * SIZE + SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    gated = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * SIZE + columns, gated.to(out_ptr.dtype.element_ty), mask=inside)

"""RMS norm, one row a program. Reference: `layers.norm.RMSNorm` without Triton (torch's `rms_norm`).

The sum of squares is taken in float32 and rounded once, after the weight, as torch does.
"""

import torch
import triton
import triton.language as tl

from folovllm.worker_proc.kernels.triton.pdl import launch_options, wait


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, dependent: bool = False) -> torch.Tensor:
    """`x / sqrt(mean(x²) + eps) · weight`: contiguous [T, size] → a new [T, size]; `dependent`: see `pdl`."""
    out = torch.empty_like(x)
    size = x.shape[-1]
    padded = triton.next_power_of_2(size)
    num_warps = 4 if padded <= 4096 else 8
    _rms_norm[(x.shape[0],)](
        x, weight, out, eps, size, padded, dependent, num_warps=num_warps, **launch_options(dependent)
    )
    return out


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, eps, SIZE: tl.constexpr, PADDED: tl.constexpr, DEPENDENT: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, PADDED)
    inside = columns < SIZE
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    wait(DEPENDENT)
    x = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    tl.store(out_ptr + start + columns, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)

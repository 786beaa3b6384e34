"""Where Triton's kernels run in tests: on the GPU, or in Triton's interpreter on the CPU (TRITON_INTERPRET=1)."""

import pytest
import torch


def triton_device() -> torch.device:
    """The device; skips the test where the package triton is missing, or where there is no way to run it."""
    triton = pytest.importorskip("triton", reason="the package triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not triton.knobs.runtime.interpret:
        pytest.skip("no CUDA device; TRITON_INTERPRET=1 runs the kernels on the CPU")
    return torch.device("cpu")


def half_types(device: torch.device) -> list[torch.dtype]:
    """Types of 16 bits to test with: the interpreter cuts bfloat16 off instead of rounding, and multiplies its bits."""
    return [torch.float16, torch.bfloat16] if device.type == "cuda" else [torch.float16]

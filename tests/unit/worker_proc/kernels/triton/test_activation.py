import pytest
import torch

from folovllm.worker_proc.layers.activation import silu_and_mul as reference


@pytest.mark.parametrize("size", [8, 1024, 1500])
def test_equals_torch(device: torch.device, size: int) -> None:
    from folovllm.worker_proc.kernels.triton.activation import silu_and_mul

    x = torch.randn(3, 2 * size) * 4
    torch.testing.assert_close(silu_and_mul(x.to(device)).cpu(), reference(x), atol=1e-5, rtol=1e-5)

import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize("size", [64, 576, 1024])
def test_equals_torch(device: torch.device, size: int) -> None:
    from folovllm.worker_proc.kernels.triton.norm import rms_norm

    x, weight = torch.randn(5, size), torch.randn(size)
    actual = rms_norm(x.to(device), weight.to(device), 1e-6).cpu()
    torch.testing.assert_close(actual, F.rms_norm(x, (size,), weight, 1e-6))


def test_a_row_of_zeros_stays_zero(device: torch.device) -> None:
    from folovllm.worker_proc.kernels.triton.norm import rms_norm

    assert torch.equal(
        rms_norm(torch.zeros(1, 64, device=device), torch.ones(64, device=device), 1e-6).cpu(), torch.zeros(1, 64)
    )

import pytest
import torch
import torch.nn.functional as F

from folovllm.worker_proc.layers.activation import silu_and_mul

EPS = 1e-6


def numbers(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator)


@pytest.mark.parametrize("columns", [64, 300])
@pytest.mark.parametrize("gated", [False, True])
def test_norm_and_product(device: torch.device, columns: int, gated: bool) -> None:
    from folovllm.worker_proc.kernels.triton.gemv import normed_gemv

    x, norm, weight = numbers(1, columns), numbers(columns), numbers(44, columns)
    product = F.rms_norm(x, (columns,), norm, EPS) @ weight.t()
    expected = silu_and_mul(product) if gated else product
    actual = normed_gemv(x.to(device), norm.to(device), EPS, weight.to(device), gated=gated, dependent=False)
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("columns", [64, 1024, 1500, 4000])
def test_product_is_added(device: torch.device, columns: int) -> None:
    from folovllm.worker_proc.kernels.triton.gemv import add_gemv

    x, weight, residual = numbers(1, columns), numbers(42, columns), numbers(1, 42)
    actual = residual.clone().to(device)
    add_gemv(actual, x.to(device), weight.to(device), dependent=False)
    torch.testing.assert_close(actual.cpu(), residual + x @ weight.t(), atol=1e-3, rtol=1e-4)

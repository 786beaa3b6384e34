import pytest
import torch
import torch.nn.functional as F

from folovllm.worker_proc.layers.rotary import rotate_into

EPS = 1e-6


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("with_norm", [False, True])
def test_rotates_the_first_heads_and_leaves_the_others(device: torch.device, head_dim: int, with_norm: bool) -> None:
    from folovllm.worker_proc.kernels.triton.heads import rotate_heads

    heads, weight = torch.randn(4, 14, head_dim), torch.randn(11, head_dim)
    cos, sin = torch.randn(4, 1, head_dim), torch.randn(4, 1, head_dim)
    expected = heads.clone()
    normed = F.rms_norm(heads[:, :11], (head_dim,), None, EPS) * weight if with_norm else heads[:, :11]
    rotate_into(expected[:, :11], normed, cos, sin)
    actual = heads.clone().to(device)
    rotate_heads(actual[:, :11], weight.to(device) if with_norm else None, cos.to(device), sin.to(device), EPS)
    torch.testing.assert_close(actual.cpu(), expected, atol=2e-5, rtol=1e-5)

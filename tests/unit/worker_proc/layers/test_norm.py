import torch

from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.layers.activation import silu_and_mul
from folovllm.worker_proc.layers.norm import HeadNorm, RMSNorm

FLOAT32 = Placement(torch.device("cpu"), torch.float32)


def by_definition(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def test_rms_norm() -> None:
    norm = RMSNorm(8, 0.1, FLOAT32)
    norm.weight.copy_(torch.arange(8))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm(x), by_definition(x, torch.arange(8.0), 0.1))


def test_head_norm_has_one_weight_for_queries_and_one_for_keys() -> None:
    norm = HeadNorm(4, 2, 8, 0.1, FLOAT32)
    norm.q_weight.copy_(torch.arange(8))
    norm.k_weight.copy_(-torch.arange(8))
    norm.spread()
    heads = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))
    before = heads.clone()
    normed = norm(heads[:, :6])
    torch.testing.assert_close(normed[:, :4], by_definition(before[:, :4], torch.arange(8.0), 0.1))
    torch.testing.assert_close(normed[:, 4:], by_definition(before[:, 4:6], -torch.arange(8.0), 0.1))
    assert torch.equal(heads, before)


def test_silu_and_mul() -> None:
    gate_and_up = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    gate, up = gate_and_up[:, :5], gate_and_up[:, 5:]
    torch.testing.assert_close(silu_and_mul(gate_and_up.clone()), gate / (1 + (-gate).exp()) * up)

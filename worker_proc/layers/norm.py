"""Root mean square norm."""

import torch
import torch.nn.functional as F

from folovllm.worker_proc.device import Placement


class RMSNorm:
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension. `weight`: [size]."""

    def __init__(self, size: int, eps: float, placement: Placement) -> None:
        self.weight = torch.empty(size, dtype=placement.dtype, device=placement.device)
        self.eps = eps
        self._shape = (size,)
        self._use_triton = placement.use_triton
        self._dependent = placement.dependent_launch

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, size] → [T, size]."""
        if self._use_triton:
            from folovllm.worker_proc.kernels.triton.norm import rms_norm

            return rms_norm(x, self.weight, self.eps, dependent=self._dependent)
        return F.rms_norm(x, self._shape, self.weight, self.eps)


class HeadNorm:
    """RMS norm of each query head and each key head of a token, with one weight for queries and one for keys.

    Both kinds of heads lie side by side, so they share one normalisation and one multiplication by `weight`
    [num_q_heads + num_kv_heads, head_dim], whose rows repeat the checkpoint's two vectors.
    """

    def __init__(self, num_q_heads: int, num_kv_heads: int, head_dim: int, eps: float, placement: Placement) -> None:
        self.q_weight = torch.empty(head_dim, dtype=placement.dtype, device=placement.device)
        self.k_weight = torch.empty_like(self.q_weight)
        self.weight = torch.empty(num_q_heads + num_kv_heads, head_dim, dtype=placement.dtype, device=placement.device)
        self.eps = eps
        self._num_q_heads = num_q_heads
        self._shape = (head_dim,)

    def spread(self) -> None:
        """Copies the two loaded vectors to the rows of `weight`."""
        self.weight[: self._num_q_heads] = self.q_weight
        self.weight[self._num_q_heads :] = self.k_weight

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        """[T, num_q_heads + num_kv_heads, head_dim] → the same shape, a new tensor."""
        return F.rms_norm(heads, self._shape, None, self.eps).mul_(self.weight)

"""Projections of one input that cannot be one product: they run one after another, their outputs lie side by side."""

from collections.abc import Iterator, Sequence

import torch

from folovllm.worker_proc.layers.activation import silu_and_mul
from folovllm.worker_proc.layers.blocked import BlockedWeight
from folovllm.worker_proc.layers.linear import LinearLayer
from folovllm.worker_proc.layers.norm import RMSNorm


class SideBySide:
    """Several linear layers in the place of one."""

    def __init__(self, layers: Sequence[LinearLayer]) -> None:
        """`layers` in the order of their outputs."""
        self.layers = tuple(layers)
        self.blocked: BlockedWeight | None = None
        self.bias: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(layer.num_bytes for layer in self.layers)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features] → [T, out_features]."""
        return torch.cat([layer(x) for layer in self.layers], 1)

    def of_normed(self, hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """The product of the normed `hidden` [T, in_features]."""
        return self(norm(hidden))

    def gated(self, hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """`silu(gate) · up` of the normed `hidden`: [T, out_features / 2]."""
        return silu_and_mul(self(norm(hidden)))

    def add_to(self, hidden: torch.Tensor, x: torch.Tensor) -> None:
        """Adds the product of `x` [T, in_features] to `hidden` [T, out_features], in place."""
        hidden.add_(self(x))

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Those of all layers."""
        for layer in self.layers:
            yield from layer.checkpoint_tensors(prefix)

    def pack(self) -> None:
        """Brings every layer's weight into its fastest layout."""
        for layer in self.layers:
            layer.pack()

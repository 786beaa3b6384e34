"""The attention interface: what a step's attention is told, and what a backend must do with it.

Tokens of all requests of a step lie one after another without padding ("flat"). Requests with exactly one query token
come first. A backend is made once; for every step it makes one AttentionStep, in which everything that layers have in
common (gather indices, masks) is computed once; the layers of the model then call `attend` in order.

    step = backend.begin_step(kv, metadata)
    hidden = model.forward(input_ids, positions, step)
"""

import dataclasses
from typing import Protocol

import torch

from folovllm.worker_proc.kv_tensors import KVTensors


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where a step's tokens belong. R requests, T tokens; ids and lengths are int64 on the model's device.

    Host numbers and device tensors say the same thing twice on purpose: shapes are decided on the host without waiting
    for the device.

    Attributes:
        query_lens: tokens of each request in this step, on the host; length R, all ≥ 1, sum T.
        seq_lens: tokens of each request after this step, context included, on the host; length R.
        num_decodes: the first this many requests have one query token; the others may have more.
        block_table: [R, ≥ blocks of the longest]; block ids in order; entries past a request's last block are 0.
        slot_mapping: [T]; where each token's K and V go: block id · block_size + offset.
        seq_lens_device: [R]; `seq_lens` on the device.
    """

    query_lens: list[int]
    seq_lens: list[int]
    num_decodes: int
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    seq_lens_device: torch.Tensor

    def __post_init__(self) -> None:
        assert len(self.query_lens) == len(self.seq_lens) == self.block_table.shape[0]
        assert all(length == 1 for length in self.query_lens[: self.num_decodes])


class AttentionStep(Protocol):
    """One step's attention, bound to the KV cache and to the step's metadata."""

    def attend(self, layer: int, query: torch.Tensor, key_and_value: torch.Tensor) -> torch.Tensor:
        """Writes the tokens' K and V to the cache of `layer`, then attends causally over each request's whole context.

        Args:
            layer: index of the layer.
            query: [T, num_q_heads, head_dim], rotated; may be a strided view.
            key_and_value: [T, 2 · num_kv_heads, head_dim], all K heads (rotated), then all V heads; may be strided.

        Returns:
            [T, num_q_heads · head_dim], softmax(query · keyᵀ / sqrt(head_dim)) · value; query heads are grouped: heads
            h · G to (h + 1) · G - 1 share KV head h.
        """
        ...


class AttentionBackend(Protocol):
    """A way to compute attention."""

    name: str

    def begin_step(self, kv: KVTensors, metadata: AttentionMetadata) -> AttentionStep:
        """What all layers of this step share is computed here."""
        ...

"""Steps of a few decoding requests on a CPU, in one compiled call each; see `kernels.cpu.decode_step`."""

from collections.abc import Callable
from typing import Protocol

import torch

from folovllm.worker_proc.input_batch import InputBatch
from folovllm.worker_proc.output_thread import PendingOutput
from folovllm.worker_proc.step_arrays import StepArrays


class Network(Protocol):
    """See `kernels.cpu.network.DecodeNetwork`."""

    max_rows: int

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        table: torch.Tensor,
        lens: list[int],
    ) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


class CpuSteps:
    """See `step_graphs.StepGraphs`. `network` gives None as long as it is not compiled."""

    def __init__(self, network: Callable[[], Network | None]) -> None:
        self._network = network

    def replay(self, step_id: int, arrays: StepArrays) -> PendingOutput | None:  # noqa: ARG002 - samples nothing
        """See `step_graphs.StepGraphs`."""
        return None

    def forward(self, batch: InputBatch) -> torch.Tensor | None:
        """Hidden states of a step in which each request has one token and there are few of them, else None."""
        metadata = batch.metadata
        network = self._network()
        if network is None or not metadata.num_decodes == len(metadata.query_lens) <= network.max_rows:
            return None
        return network.forward(
            batch.input_ids, batch.positions, metadata.slot_mapping, metadata.block_table, metadata.seq_lens
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Logits in float32 of few rows, whatever step they come from, else None."""
        network = self._network()
        return None if network is None or len(hidden) > network.max_rows else network.logits(hidden)

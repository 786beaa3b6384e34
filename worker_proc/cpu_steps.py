"""Steps on a CPU, in one compiled call each; see `kernels.cpu.decode_step` and `wide_step`."""

from collections.abc import Callable
from typing import Protocol

import torch

from folovllm.worker_proc.attention.backend import AttentionMetadata
from folovllm.worker_proc.input_batch import InputBatch
from folovllm.worker_proc.output_thread import PendingOutput
from folovllm.worker_proc.step_arrays import StepArrays


class Network(Protocol):
    """See `kernels.cpu.network.CompiledNetwork`."""

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor | None: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None: ...


class CpuSteps:
    """See `step_graphs.StepGraphs`. `network` gives None as long as it is not compiled."""

    def __init__(self, network: Callable[[], Network | None]) -> None:
        self._network = network

    def replay(self, step_id: int, arrays: StepArrays) -> PendingOutput | None:  # noqa: ARG002 - samples nothing
        """See `step_graphs.StepGraphs`."""
        return None

    def forward(self, batch: InputBatch) -> torch.Tensor | None:
        """Hidden states of a step that there is code for, else None."""
        network = self._network()
        return None if network is None else network.forward(batch.input_ids, batch.positions, batch.metadata)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Logits in float32, whatever step the hidden states come from; None if there is no code for so many."""
        network = self._network()
        return None if network is None else network.logits(hidden)

    def prepare_ahead(self) -> bool:
        """See `step_graphs.StepGraphs`: code is compiled by a thread of its own."""
        return False

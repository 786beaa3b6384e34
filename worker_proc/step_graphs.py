"""What may compute a whole step in one go, in place of the runner's own operators."""

from typing import Protocol

import torch

from folovllm.worker_proc.input_batch import InputBatch
from folovllm.worker_proc.output_thread import PendingOutput
from folovllm.worker_proc.step_arrays import StepArrays


class StepGraphs(Protocol):
    """Captured steps; chosen at the start, see `cuda_graphs`."""

    def replay(self, step_id: int, arrays: StepArrays) -> PendingOutput | None:
        """The result, on its way, of a step that has been applied to the rows; None if the runner is to compute it.

        A step that is taken is counted as computed, on the host and on the device.
        """
        ...

    def forward(self, batch: InputBatch) -> torch.Tensor | None:
        """Hidden states [T, hidden_size] of a step's tokens; None if the runner is to compute them."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Logits [R, vocab_size] after hidden states [R, hidden_size]; None if the runner is to compute them."""
        ...

    def prepare_ahead(self) -> bool:
        """While no step comes: captures something that was wanted, unless the device is busy; False if nothing is."""
        ...


class NoGraphs:
    """For devices without graphs, and for runners that only measure."""

    def replay(self, step_id: int, arrays: StepArrays) -> PendingOutput | None:  # noqa: ARG002 - takes no step
        return None

    def forward(self, batch: InputBatch) -> torch.Tensor | None:  # noqa: ARG002 - takes no step
        return None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:  # noqa: ARG002 - takes no rows
        return None

    def prepare_ahead(self) -> bool:
        return False

"""One step in, its tokens out. `ModelRunner.execute` is the whole order of a step; all else is a leaf that it names."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from folovllm.common.messages.core_worker import ModelRunnerOutput, SchedulerOutput
from folovllm.worker_proc.attention.backend import AttentionBackend
from folovllm.worker_proc.host_to_device import Download, upload
from folovllm.worker_proc.input_batch import InputBatch, InputBatchBuilder
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.models.registry import CausalLM
from folovllm.worker_proc.output_thread import PendingOutput
from folovllm.worker_proc.request_states import RequestStates
from folovllm.worker_proc.sample.constraints import apply_constraints
from folovllm.worker_proc.sample.sampler import Sampled, sample
from folovllm.worker_proc.step_arrays import StepArrays
from folovllm.worker_proc.step_graphs import NoGraphs, StepGraphs

_VOID = -1  # travels to the host in place of a token that means nothing: one copy tells both


class StepResult:
    """A step's tokens on their way to the host; None if no slot samples."""

    def __init__(self, step_id: int, sampled: Sampled | None) -> None:
        self.step_id = step_id
        self._tokens = None if sampled is None else Download(sampled.token_ids.masked_fill(sampled.is_void, _VOID))

    def wait(self) -> ModelRunnerOutput:
        """The result, once the device has it."""
        if self._tokens is None:
            return ModelRunnerOutput(self.step_id)
        tokens = self._tokens.wait()
        return ModelRunnerOutput(self.step_id, _int32_bytes(tokens), _int32_bytes(np.flatnonzero(tokens == _VOID)))


class ModelRunner:
    """Holds the model, the KV cache and the persistent rows.

    Steps are executed in the order they come; nothing here waits for the device. A step that is refused changes
    nothing. One that fails later counts as computed, its tokens being void, so that a step which was sent before the
    failure was known finds the counts that it was made for.
    """

    def __init__(
        self,
        model: CausalLM,
        backend: AttentionBackend,
        kv: KVTensors,
        states: RequestStates,
        graphs: StepGraphs | None = None,
    ) -> None:
        self._graphs = graphs or NoGraphs()
        self._model = model
        self._backend = backend
        self._kv = kv
        self._states = states
        self._num_valid_token_ids = states.limits.num_valid_token_ids
        self._input_batch = InputBatchBuilder(states)

    @torch.inference_mode()
    def execute(self, step: SchedulerOutput) -> PendingOutput:
        """Computes one step; its result is still on the device.

        Raises:
            ProtocolError: the step does not fit what the worker knows; nothing is changed.
        """
        arrays = self._states.apply(step)
        self._copy_blocks(arrays)
        if (replayed := self._graphs.replay(step.step_id, arrays)) is not None:
            return replayed
        batch = self._input_batch.build(arrays)
        index = batch.index
        self._states.advance(arrays, index.slots, index.query_lens, index.host_sampling_slots)
        hidden = self._forward(batch)
        if batch.num_sampling == 0:
            return StepResult(step.step_id, None)
        logits = self._model.compute_logits(batch.sampling_rows(hidden))[:, : self._num_valid_token_ids].float()
        apply_constraints(logits, batch.constraints)
        sampled = sample(logits, batch.sampling)
        self._states.record(index.sampling_slots, batch.next_positions, sampled.token_ids)
        return StepResult(step.step_id, sampled)

    def _forward(self, batch: InputBatch) -> torch.Tensor:
        """[T, hidden_size], from a captured pass or operator by operator."""
        hidden = self._graphs.forward(batch)
        if hidden is not None:
            return hidden
        return self._model.forward(batch.input_ids, batch.positions, self._backend.begin_step(self._kv, batch.metadata))

    def _copy_blocks(self, arrays: StepArrays) -> None:
        if len(arrays.copy_sources):
            device = self._states.device
            self._kv.copy_blocks(upload(arrays.copy_sources, device), upload(arrays.copy_destinations, device))


def _int32_bytes(values: npt.NDArray[Any]) -> bytes:
    return values.astype("<i4").tobytes()

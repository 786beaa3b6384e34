"""One step in, its tokens out. `ModelRunner.execute` is the whole order of a step; all else is a leaf that it names."""

from collections.abc import Mapping, Sequence
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
from folovllm.worker_proc.sample.logprobs import (
    LogprobRows,
    PendingPromptLogprobs,
    SampledLogprobs,
    prompt_logprobs,
)
from folovllm.worker_proc.sample.processors import LogitsProcessor
from folovllm.worker_proc.sample.sampler import Sampled, sample
from folovllm.worker_proc.step_arrays import StepArrays
from folovllm.worker_proc.step_graphs import NoGraphs, StepGraphs
from folovllm.worker_proc.step_parts import StepsInParts

_VOID = -1  # travels to the host in place of a token that means nothing: one copy tells both


class StepResult:
    """A step's tokens on their way to the host (None if no slot samples), and log probabilities for who asked."""

    def __init__(
        self,
        step_id: int,
        sampled: Sampled | None,
        logprobs: SampledLogprobs | None = None,
        prompts: Sequence[PendingPromptLogprobs] = (),
    ) -> None:
        self.step_id = step_id
        self._logprobs = logprobs
        self._prompts = prompts
        self._num_tokens = 0 if sampled is None else len(sampled.token_ids)
        self._words = None if sampled is None else Download(_as_words(sampled, logprobs))

    def wait(self) -> ModelRunnerOutput:
        """The result, once the device has it."""
        prompts = [pending.wait() for pending in self._prompts]
        if self._words is None:
            return ModelRunnerOutput(self.step_id, prompt_logprobs=prompts)
        words = self._words.wait()
        tokens = words[: self._num_tokens]
        is_void = tokens == _VOID
        token_ids, no_token_rows = _int32_bytes(tokens), _int32_bytes(np.flatnonzero(is_void))
        if self._logprobs is None:
            return ModelRunnerOutput(self.step_id, token_ids, no_token_rows, prompt_logprobs=prompts)
        rows, logprobs = self._logprobs.read(words[self._num_tokens :], is_void)
        return ModelRunnerOutput(self.step_id, token_ids, no_token_rows, "", _int32_bytes(rows), logprobs, prompts)


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
        processors: Mapping[str, LogitsProcessor] | None = None,
    ) -> None:
        """`graphs`: captured steps, none by default; `processors`: loaded logits processors by name."""
        self._graphs = graphs or NoGraphs()
        self._model = model
        self._backend = backend
        self._kv = kv
        self._states = states
        self._num_valid_token_ids = states.limits.num_valid_token_ids
        self._input_batch = InputBatchBuilder(states, processors or {})
        self._steps = StepsInParts(self._compute, states.skip, states.device)

    @torch.inference_mode()
    def execute(self, step: SchedulerOutput) -> PendingOutput:
        """Computes one step; its result is still on the device.

        Raises:
            ProtocolError: the step does not fit what the worker knows; nothing is changed.
            EngineError: the device has too little memory for the smallest part of a step.
        """
        arrays = self._states.apply(step)
        self._copy_blocks(arrays)
        return self._steps.run(step.step_id, arrays)

    @torch.inference_mode()
    def prepare_ahead(self) -> bool:
        """See `step_graphs.StepGraphs`."""
        return self._graphs.prepare_ahead()

    def _compute(self, step_id: int, arrays: StepArrays) -> PendingOutput:
        """A step that has been applied. One that memory does not suffice for is not counted: it comes again."""
        if (replayed := self._graphs.replay(step_id, arrays)) is not None:
            return replayed
        batch = self._input_batch.build(arrays)
        index = batch.index
        counted = arrays, index.slots, index.query_lens, index.host_sampling_slots
        self._states.advance(*counted)
        try:
            return self._forward_and_sample(step_id, batch)
        except torch.OutOfMemoryError:
            self._states.take_back(*counted)
            raise

    def _forward_and_sample(self, step_id: int, batch: InputBatch) -> PendingOutput:
        hidden = self._forward(batch)
        prompts = self._prompt_logprobs(batch, hidden)
        if batch.num_sampling == 0:
            return StepResult(step_id, None, None, prompts)
        from_network = self._logits(batch.sampling_rows(hidden))
        asked = batch.index.constraints.logprobs
        logits = from_network[:, : self._num_valid_token_ids].to(torch.float32, copy=asked is not None)
        apply_constraints(logits, batch.constraints)
        sampled = sample(logits, batch.sampling)
        logprobs = self._logprobs(asked, from_network, sampled)
        result = StepResult(step_id, sampled, logprobs, prompts)
        self._states.record(batch.index.sampling_slots, batch.next_positions, sampled.token_ids)
        return result

    def _logprobs(self, asked: LogprobRows | None, logits: torch.Tensor, sampled: Sampled) -> SampledLogprobs | None:
        if asked is None:
            return None
        return SampledLogprobs(asked, logits, sampled.token_ids, self._num_valid_token_ids)

    def _prompt_logprobs(self, batch: InputBatch, hidden: torch.Tensor) -> list[PendingPromptLogprobs]:
        return prompt_logprobs(
            batch.prompt_parts,
            hidden,
            self._model.compute_logits,
            self._states.token_ids,
            self._num_valid_token_ids,
        )

    def _forward(self, batch: InputBatch) -> torch.Tensor:
        """[T, hidden_size], from a captured pass or operator by operator."""
        hidden = self._graphs.forward(batch)
        if hidden is not None:
            return hidden
        return self._model.forward(batch.input_ids, batch.positions, self._backend.begin_step(self._kv, batch.metadata))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, hidden_size] → [S, vocab_size]."""
        logits = self._graphs.logits(hidden)
        return self._model.compute_logits(hidden) if logits is None else logits

    def _copy_blocks(self, arrays: StepArrays) -> None:
        if len(arrays.copy_sources):
            device = self._states.device
            self._kv.copy_blocks(upload(arrays.copy_sources, device), upload(arrays.copy_destinations, device))


def _as_words(sampled: Sampled, logprobs: SampledLogprobs | None) -> torch.Tensor:
    """What goes to the host in one copy: tokens, and as int32 words what is reported with them."""
    tokens = sampled.token_ids.masked_fill(sampled.is_void, _VOID)
    return tokens if logprobs is None else torch.cat([tokens.to(torch.int32), *logprobs.words])


def _int32_bytes(values: npt.NDArray[Any]) -> bytes:
    return values.astype("<i4").tobytes()

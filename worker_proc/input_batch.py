"""This step's tensors: made new each step, gathered on the device from the persistent rows.

What depends only on which slots a step schedules (indices, sampling parameters) is kept as long as the same slots
decode, so that such a step uploads nothing: inputs, positions and the places of K and V are computed on the device.

Tokens of all requests lie flat, one after another. R requests, T tokens, S of the requests sample: those whose last
known token is computed in this step.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch

from folovllm.worker_proc.attention.backend import AttentionMetadata
from folovllm.worker_proc.host_to_device import upload
from folovllm.worker_proc.request_states import (
    MIN_P,
    NUM_PROMPT,
    SAMPLE_INDEX,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    RequestStates,
)
from folovllm.worker_proc.row_constraints import RowConstraints, SharedParts
from folovllm.worker_proc.sample.constraints import Constraint
from folovllm.worker_proc.sample.logprobs import PromptPart
from folovllm.worker_proc.sample.processors import LogitsProcessor
from folovllm.worker_proc.sample.sampler import SamplingTensors, split_rows
from folovllm.worker_proc.sample.token_mask import TokenMask
from folovllm.worker_proc.step_arrays import StepArrays
from folovllm.worker_proc.wire_fields import Ids


@dataclasses.dataclass(frozen=True, slots=True)
class BatchIndex:
    """What depends on a step's slots, token counts and on who samples, but not on how far the requests are.

    Attributes:
        key: of the step it was made for; `version` is that of the persistent rows.
        samples: [R] bool, on the host.
        slots, query_lens: [R]; `host_slots` and `query_lens_list` are the same on the host.
        token_slots: [T] each token's slot.
        token_offsets: [T] each token's place among its request's tokens of this step.
        all_sample: every request samples, and after its only token: nothing has to be selected.
        rows: [S] the requests that sample.
        logits_rows: [S] their last tokens.
        sampling_slots: [S]; `host_sampling_slots` is the same on the host.
        num_prompt: [S] prompt lengths.
        sampling: parameters of the S rows; `position` is the step's and replaced.
        constraints: what the S rows ask for beyond these.
    """

    key: tuple[bytes, bytes]
    version: int
    samples: np.ndarray[tuple[int], np.dtype[np.bool_]]
    slots: torch.Tensor
    host_slots: Ids
    query_lens: torch.Tensor
    query_lens_list: list[int]
    token_slots: torch.Tensor
    token_offsets: torch.Tensor
    all_sample: bool
    rows: torch.Tensor
    logits_rows: torch.Tensor
    sampling_slots: torch.Tensor
    host_sampling_slots: Ids
    num_prompt: torch.Tensor
    sampling: SamplingTensors
    constraints: RowConstraints


@dataclasses.dataclass(frozen=True, slots=True)
class InputBatch:
    """One step's inputs.

    Attributes:
        index: what the step has in common with others of the same slots.
        input_ids, positions: [T].
        metadata: for the attention backend.
        sampling: parameters of the S rows that sample.
        constraints: what changes the logits of some of the S rows.
        next_positions: [S] where in its row each sampled token goes.
        prompt_parts: prompt tokens whose log probabilities are to be reported.
    """

    index: BatchIndex
    input_ids: torch.Tensor
    positions: torch.Tensor
    metadata: AttentionMetadata
    sampling: SamplingTensors
    constraints: list[Constraint]
    next_positions: torch.Tensor
    prompt_parts: list[PromptPart]

    @property
    def num_sampling(self) -> int:
        return len(self.index.host_sampling_slots)

    def sampling_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] → [S, H]: the last token of every request that samples."""
        return hidden if self.index.all_sample else hidden.index_select(0, self.index.logits_rows)


class InputBatchBuilder:
    """Builds the steps' batches from the persistent rows. `processors`: the logits processors that are loaded."""

    def __init__(self, states: RequestStates, processors: Mapping[str, LogitsProcessor]) -> None:
        self._states = states
        self._shared = SharedParts(states, processors)
        self._index: BatchIndex | None = None

    def build(self, step: StepArrays) -> InputBatch:
        """The batch of a step that has been applied to the rows and not yet been counted as computed."""
        states, counts = self._states, self._states.counts
        seq_lens = counts.num_computed[step.slots] + step.query_lens
        index = self._index_of(step, seq_lens == counts.num_tokens[step.slots])
        positions = states.num_computed.index_select(0, index.token_slots) + index.token_offsets
        flat = index.token_slots * states.limits.max_model_len + positions
        input_ids = states.token_ids.view(-1).index_select(0, flat).to(torch.int64)
        metadata = self._metadata(step, index, seq_lens, positions)
        ends = metadata.seq_lens_device
        next_positions = ends if index.all_sample else ends.index_select(0, index.rows)
        return InputBatch(
            index,
            input_ids,
            positions,
            metadata,
            dataclasses.replace(index.sampling, position=next_positions - index.num_prompt),
            [*self._constraints(index, next_positions, seq_lens), *self._token_masks(step, index)],
            next_positions,
            self._prompt_parts(step, seq_lens),
        )

    def _metadata(
        self, step: StepArrays, index: BatchIndex, seq_lens: Ids, positions: torch.Tensor
    ) -> AttentionMetadata:
        table, size = self._states.block_table, self._states.limits.block_size
        num_blocks = -(-int(seq_lens.max()) // size)
        blocks = table.view(-1).index_select(0, index.token_slots * table.shape[1] + positions // size)
        return AttentionMetadata(
            query_lens=index.query_lens_list,
            seq_lens=seq_lens.tolist(),
            num_decodes=step.num_decodes,
            block_table=table[:, :num_blocks].index_select(0, index.slots),
            slot_mapping=blocks * size + positions % size,
            seq_lens_device=self._states.num_computed.index_select(0, index.slots) + index.query_lens,
        )

    def _index_of(self, step: StepArrays, samples: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> BatchIndex:
        """The index of the last step if it fits this one too, else a new one."""
        index = self._index
        if (
            index is None
            or index.version != self._states.version  # slots of the same numbers are other requests'
            or step.key != index.key
            or not np.array_equal(samples, index.samples)
        ):
            self._index = index = self._make_index(step, samples)
        return index

    def _make_index(self, step: StepArrays, samples: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> BatchIndex:
        lens, num_requests = step.query_lens, len(step.slots)
        ends = np.cumsum(lens)
        rows = np.flatnonzero(samples)
        sampling_slots = step.slots[rows]
        offsets = np.arange(int(ends[-1])) - np.repeat(ends - lens, lens)
        packed = np.concatenate(
            [step.slots, lens, np.repeat(step.slots, lens), offsets, rows, ends[rows] - 1, sampling_slots]
        )
        sizes = [num_requests] * 2 + [len(offsets)] * 2 + [len(rows)] * 3
        slots, query_lens, token_slots, token_offsets, rows_device, logits_rows, sampling_device = upload(
            packed, self._states.device
        ).split(sizes)
        return BatchIndex(
            key=step.key,
            version=self._states.version,
            samples=samples,
            slots=slots,
            host_slots=step.slots,
            query_lens=query_lens,
            query_lens_list=lens.tolist(),
            token_slots=token_slots,
            token_offsets=token_offsets,
            all_sample=len(rows) == len(offsets),
            rows=rows_device,
            logits_rows=logits_rows,
            sampling_slots=sampling_device,
            host_sampling_slots=sampling_slots,
            num_prompt=self._states.integers[:, NUM_PROMPT].index_select(0, sampling_device),
            sampling=self._sampling(sampling_slots, sampling_device),
            constraints=RowConstraints(self._states, sampling_slots, self._shared),
        )

    def _sampling(self, slots: Ids, slots_device: torch.Tensor) -> SamplingTensors:
        floats = self._states.floats.index_select(0, slots_device)
        integers = self._states.integers.index_select(0, slots_device)
        host_floats, host_integers = self._states.host_floats[slots], self._states.host_integers[slots]
        plain, filtered = split_rows(
            host_floats[:, TEMPERATURE].tolist(),
            host_integers[:, TOP_K].tolist(),
            host_floats[:, TOP_P].tolist(),
            host_floats[:, MIN_P].tolist(),
        )
        return SamplingTensors(
            temperature=floats[:, TEMPERATURE].to(torch.float32),
            top_k=integers[:, TOP_K],
            top_p=floats[:, TOP_P],
            min_p=floats[:, MIN_P].to(torch.float32),
            seed=integers[:, SEED],
            sample_index=integers[:, SAMPLE_INDEX],
            position=integers[:, SAMPLE_INDEX],
            plain_rows=self._rows(plain),
            filtered_rows=self._rows(filtered),
        )

    def _rows(self, rows: list[int]) -> torch.Tensor | None:
        return upload(np.array(rows, np.int64), self._states.device) if rows else None

    def _token_masks(self, step: StepArrays, index: BatchIndex) -> list[Constraint]:
        if not len(step.masked_slots):
            return []
        order = np.argsort(index.host_sampling_slots)
        rows = order[np.searchsorted(index.host_sampling_slots, step.masked_slots, sorter=order)]
        return [TokenMask(rows, step.token_masks, self._states.device)]

    def _constraints(self, index: BatchIndex, num_known: torch.Tensor, seq_lens: Ids) -> list[Constraint]:
        return index.constraints.of_step(index.sampling_slots, index.num_prompt, num_known, seq_lens[index.samples])

    def _prompt_parts(self, step: StepArrays, seq_lens: Ids) -> list[PromptPart]:
        """What this step's tokens say of the prompts that are reported: each token's output is about the next one."""
        states = self._states
        reports = states.reports_prompt[step.slots]
        if not reports.any():
            return []
        parts, firsts = [], np.cumsum(step.query_lens) - step.query_lens
        for row in np.flatnonzero(reports).tolist():
            slot = int(step.slots[row])
            start = int(seq_lens[row] - step.query_lens[row]) + 1
            count = min(int(seq_lens[row]) + 1, int(states.host_integers[slot, NUM_PROMPT])) - start
            extras = states.extras[slot]
            if count > 0 and extras is not None and extras.prompt_logprobs is not None:
                parts.append(PromptPart(row, slot, start, count, int(firsts[row]), extras.prompt_logprobs))
        return parts

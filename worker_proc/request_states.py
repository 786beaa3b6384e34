"""What lives on the device from step to step: one row per slot, changed only where a step says that something changed.

Tokens stay here: a sampled token is written to its row and gathered from it as the next input, so a step can be given
before the token of the one before is known to anybody else. Counts are kept on the host too (`counts`): they follow
from the steps alone, whatever is sampled.
"""

from collections.abc import Sequence

import numpy as np
import torch

from folovllm.common.messages.core_worker import SchedulerOutput
from folovllm.worker_proc.host_to_device import upload
from folovllm.worker_proc.sampling_extras import SamplingExtras
from folovllm.worker_proc.step_arrays import NewRow, SlotCounts, StepArrays, StepLimits, read_step
from folovllm.worker_proc.wire_fields import Ids

# Columns of `floats` and `integers`.
TEMPERATURE, TOP_P, MIN_P = range(3)
TOP_K, SEED, SAMPLE_INDEX, NUM_PROMPT, MIN_TOKENS = range(5)


class RequestStates:
    """The persistent rows. All tensors are on `device` and indexed by slot first.

    Attributes:
        limits: sizes that steps must keep to.
        counts: known, computed tokens and blocks of each slot, on the host.
        token_ids: int32 [num_slots, max_model_len]; the prompt and the output.
        num_computed: int64 [num_slots]; `counts.num_computed` on the device.
        block_table: int64 [num_slots, max_blocks]; 0 past a slot's last block.
        floats: float64 [num_slots, 3]; temperature, top_p, min_p.
        integers: int64 [num_slots, 5]; top_k, seed (its 64 bits), sample_index, prompt length, min_tokens.
        host_floats, host_integers: the same on the host, to choose shapes and shortcuts by.
        stop_token_ids: on the host, each slot's stop set.
        extras: on the host, what each slot's request asks for beyond the tensors above.
        is_plain: bool [num_slots], on the host; False where the steps that sample have to look at `extras`.
        reports_prompt: bool [num_slots], on the host; the request wants log probabilities of its prompt.
        version: how often slots were filled; what was made of rows before is out of date.
    """

    def __init__(self, limits: StepLimits, device: torch.device) -> None:
        slots = limits.num_slots
        self.limits = limits
        self.device = device
        self.counts = SlotCounts.empty(slots)
        self.token_ids = torch.zeros(slots, limits.max_model_len, dtype=torch.int32, device=device)
        self.num_computed = torch.zeros(slots, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(slots, limits.max_blocks, dtype=torch.int64, device=device)
        self.floats = torch.zeros(slots, 3, dtype=torch.float64, device=device)
        self.integers = torch.zeros(slots, 5, dtype=torch.int64, device=device)
        self.host_floats = np.zeros((slots, 3), np.float64)
        self.host_integers = np.zeros((slots, 5), np.int64)
        self.stop_token_ids: list[Ids] = [np.zeros(0, np.int64)] * slots
        self.extras: list[SamplingExtras | None] = [None] * slots
        self.is_plain = np.ones(slots, np.bool_)
        self.reports_prompt = np.zeros(slots, np.bool_)
        self.version = 0

    def num_bytes(self) -> int:
        """Bytes on the device."""
        tensors = (self.token_ids, self.num_computed, self.block_table, self.floats, self.integers)
        return sum(tensor.nbytes for tensor in tensors)

    def apply(self, step: SchedulerOutput) -> StepArrays:
        """Checks the step and brings the rows up to date with it: new requests, then appended blocks.

        Raises:
            ProtocolError: the step does not fit; nothing is changed then.
        """
        arrays = read_step(step, self.counts, self.limits)
        self.counts = arrays.counts
        if arrays.new_rows:
            self._fill(arrays.new_rows)
        if len(arrays.entries.slots):
            entries = arrays.entries
            places = entries.slots * self.block_table.shape[1] + entries.columns
            packed = upload(np.stack([places, entries.block_ids]), self.device)
            self.block_table.view(-1).index_copy_(0, packed[0], packed[1])
        return arrays

    def advance(self, arrays: StepArrays, slots: torch.Tensor, query_lens: torch.Tensor, samples: Ids) -> None:
        """Counts the step as computed. `slots`, `query_lens` are on the device; `samples` are the slots that sample."""
        self.num_computed.index_add_(0, slots, query_lens)
        self.counts.num_computed[arrays.slots] += arrays.query_lens
        self.counts.num_tokens[samples] += 1

    def take_back(self, arrays: StepArrays, slots: torch.Tensor, query_lens: torch.Tensor, samples: Ids) -> None:
        """Undoes `advance`: the step was not computed, and will be, in parts."""
        self.num_computed.index_add_(0, slots, query_lens, alpha=-1)  # takes no memory
        self.counts.num_computed[arrays.slots] -= arrays.query_lens
        self.counts.num_tokens[samples] -= 1

    def skip(self, arrays: StepArrays) -> None:
        """Counts a step as computed that is not: one that was sent before this is known finds what it was made for."""
        counts = self.counts
        ends = counts.num_computed[arrays.slots] + arrays.query_lens
        samples = arrays.slots[ends == counts.num_tokens[arrays.slots]]
        self.advance(arrays, upload(arrays.slots, self.device), upload(arrays.query_lens, self.device), samples)

    def record(self, slots: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Writes sampled tokens [S] to `positions` of their `slots`: they are the next inputs."""
        flat = slots * self.limits.max_model_len + positions
        self.token_ids.view(-1).index_copy_(0, flat, token_ids.to(torch.int32))

    def forget_all(self) -> None:
        """Empties every slot: only a new request makes one usable again."""
        self.counts = SlotCounts.empty(self.limits.num_slots)

    def _fill(self, rows: Sequence[NewRow]) -> None:
        """Overwrites the slots of new requests, all of them in one copy and a few operations."""
        self.version += 1
        for row in rows:
            self._fill_host(row)
        slots = np.array([row.slot for row in rows], np.int64)
        packed = [
            slots,
            np.array([row.num_computed_tokens for row in rows], np.int64),
            self.host_floats[slots].view(np.int64).ravel(),  # their bits
            self.host_integers[slots].ravel(),
            *_ragged(slots * self.token_ids.shape[1], [row.token_ids for row in rows]),
            *_ragged(slots * self.block_table.shape[1], [row.block_ids for row in rows]),
        ]
        places, computed, floats, integers, token_places, tokens, block_places, blocks = upload(
            np.concatenate(packed), self.device
        ).split([len(part) for part in packed])
        self.num_computed.index_copy_(0, places, computed)
        self.floats.index_copy_(0, places, floats.view(torch.float64).view(len(rows), -1))
        self.integers.index_copy_(0, places, integers.view(len(rows), -1))
        self.token_ids.view(-1).index_copy_(0, token_places, tokens.to(torch.int32))
        self.block_table.index_fill_(0, places, 0)
        self.block_table.view(-1).index_copy_(0, block_places, blocks)

    def _fill_host(self, row: NewRow) -> None:
        sampling = row.sampling
        seed = np.array(sampling.seed & (2**64 - 1), np.uint64).astype(np.int64)  # the same 64 bits, signed
        self.host_floats[row.slot] = (sampling.temperature, sampling.top_p, sampling.min_p)
        self.host_integers[row.slot] = (
            sampling.top_k,
            seed,
            sampling.sample_index,
            row.num_prompt_tokens,
            sampling.min_tokens,
        )
        self.stop_token_ids[row.slot] = row.stop_token_ids
        extras = self.extras[row.slot] = row.extras
        self.is_plain[row.slot] = extras is None or not extras.concerns_sampling
        self.reports_prompt[row.slot] = extras is not None and extras.prompt_logprobs is not None


def _ragged(starts: Ids, rows: Sequence[Ids]) -> tuple[Ids, Ids]:
    """Places and values of rows of different lengths, each beginning at its start."""
    lengths = [len(row) for row in rows]
    return np.repeat(starts, lengths) + np.concatenate([np.arange(length) for length in lengths]), np.concatenate(rows)

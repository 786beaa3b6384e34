"""Steps in parts, where the device's memory does not suffice for whole ones.

The measurement at the start runs the largest steps, but other programs take memory too, and graphs, libraries and the
allocator's waste grow later. So a step that runs out of memory is not lost: it is counted back, what the allocator
holds for later is given up, and the step's tokens are computed again in parts of half as many. A part is a step like
any other: some of the requests, or some tokens of one, which is then a chunk. What was written to the cache by the
step that failed is written again, and is the same.

The bound stays for all later steps, and is told to the core, which makes no larger ones from then on. It is never
raised again: memory that was missing once comes back at a time that nobody knows. At `_FLOOR` tokens it ends: a device
that has no room for these has none for an engine, and the step fails.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import torch

from folovllm.common.errors import EngineError
from folovllm.common.log import get_logger
from folovllm.common.messages.core_worker import Logprobs, ModelRunnerOutput, PromptLogprobs
from folovllm.worker_proc.output_thread import PendingOutput
from folovllm.worker_proc.step_arrays import StepArrays

_FLOOR: Final = 16  # tokens

logger = get_logger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class StepPart:
    """Some of a step's tokens, as a step; `first_row` is the index of its first slot in the whole step."""

    arrays: StepArrays
    first_row: int

    @property
    def num_tokens(self) -> int:
        return int(self.arrays.query_lens.sum())


def split_step(part: StepPart, most: int) -> Iterator[StepPart]:
    """Parts of at most `most` tokens, in order; only their last one holds the last token of a request that is cut."""
    ends = np.cumsum(part.arrays.query_lens)
    for first in range(0, int(ends[-1]), most):
        yield _cut(part, first, min(first + most, int(ends[-1])))


def _cut(part: StepPart, first: int, end: int) -> StepPart:
    """The tokens `first` to `end`."""
    arrays = part.arrays
    ends = np.cumsum(arrays.query_lens)
    begins = ends - arrays.query_lens
    rows = np.flatnonzero((begins < end) & (ends > first))
    slots, row = arrays.slots[rows], int(rows[0])
    query_lens = np.minimum(ends[rows], end) - np.maximum(begins[rows], first)
    num_decodes = max(0, min(arrays.num_decodes - row, len(rows)))
    is_masked = np.isin(arrays.masked_slots, arrays.slots[rows[ends[rows] <= end]])
    cut = dataclasses.replace(
        arrays,
        key=(slots.astype("<i4").tobytes(), query_lens[num_decodes:].astype("<i4").tobytes()),
        slots=slots,
        query_lens=query_lens,
        num_decodes=num_decodes,
        masked_slots=arrays.masked_slots[is_masked],
        token_masks=arrays.token_masks[is_masked],
    )
    return StepPart(cut, part.first_row + row)


class StepsInParts:
    """Computes steps, in parts once memory did not suffice.

    Args:
        compute: computes a step that was applied to the rows. Raises torch.OutOfMemoryError with the rows as before,
            anything else with the step counted as computed.
        skip: counts a step as computed that is not.
        device: whose allocator gives up what it holds.
    """

    def __init__(
        self,
        compute: Callable[[int, StepArrays], PendingOutput],
        skip: Callable[[StepArrays], None],
        device: torch.device,
    ) -> None:
        self._compute = compute
        self._skip = skip
        self._device = device
        self._most: int | None = None  # tokens of a part; None as long as memory has sufficed

    def run(self, step_id: int, arrays: StepArrays) -> PendingOutput:
        """The step's result, on its way.

        Raises:
            EngineError: memory does not suffice for the smallest part. The step is counted as computed, as it is
                after whatever else goes wrong in it.
        """
        whole = StepPart(arrays, 0)
        if self._fits(whole) and (result := self._try(step_id, whole)) is not None:
            return result
        pending = [whole]
        known: list[tuple[ModelRunnerOutput, int]] = []
        try:
            while True:
                part = pending.pop(0)
                if not self._fits(part):
                    pending[:0] = split_step(part, self._most or part.num_tokens)
                elif (result := self._try(step_id, part)) is None:
                    pending.insert(0, part)
                elif pending:  # waited for: captured steps keep a few results only, and memory is short
                    known.append((result.wait(), part.first_row))
                else:
                    return JoinedOutput(known, result, part.first_row, self._most or 0)
        except Exception:
            for part in pending:
                self._skip(part.arrays)
            raise

    def _fits(self, part: StepPart) -> bool:
        return self._most is None or part.num_tokens <= self._most

    def _try(self, step_id: int, part: StepPart) -> PendingOutput | None:
        """None if memory did not suffice: there is more of it then, and the bound is lower.

        Returns before anything is tried again: the error holds on to the tensors of the step that it ended.
        """
        try:
            return self._compute(step_id, part.arrays)
        except torch.OutOfMemoryError as error:
            cause = str(error)
        if part.num_tokens <= _FLOOR:
            self._skip(part.arrays)
            raise EngineError(
                f"the device has no memory left for a step of {part.num_tokens} tokens ({cause}); lower "
                "gpu_memory_utilization or kv_cache_memory_gb, or end other programs on the device"
            )
        self._most = max(_FLOOR, -(-part.num_tokens // 2))
        logger.warning(
            "no memory left for a step of %d tokens (%s): it is computed in parts of %d, and no later step has more",
            part.num_tokens,
            cause,
            self._most,
        )
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return None


class JoinedOutput:
    """The results of a step's parts, as that of the step."""

    def __init__(
        self, known: Sequence[tuple[ModelRunnerOutput, int]], last: PendingOutput, first_row: int, max_num_tokens: int
    ) -> None:
        """`known`: all but the last part, each with its first row; `max_num_tokens`: what the core is told."""
        self.step_id = last.step_id
        self._known = known
        self._last = last
        self._first_row = first_row
        self._max_num_tokens = max_num_tokens

    def wait(self) -> ModelRunnerOutput:
        """The result, once the device has all of it."""
        outputs = [*self._known, (self._last.wait(), self._first_row)]
        num_tokens = [len(output.token_ids) // 4 for output, _ in outputs]
        firsts = np.cumsum([0, *num_tokens])[:-1].tolist()
        logprobs = [output.logprobs for output, _ in outputs if output.logprobs is not None]
        prompts: list[PromptLogprobs] = []
        for output, first_row in outputs:
            for each in output.prompt_logprobs:
                _add_prompt(prompts, first_row + each.row, each)
        return ModelRunnerOutput(
            self.step_id,
            b"".join(output.token_ids for output, _ in outputs),
            _shifted([output.no_token_rows for output, _ in outputs], firsts),
            logprob_rows=_shifted([output.logprob_rows for output, _ in outputs], firsts),
            logprobs=_joined(logprobs) if logprobs else None,
            prompt_logprobs=prompts,
            max_num_tokens=self._max_num_tokens,
        )


def _add_prompt(prompts: list[PromptLogprobs], row: int, part: PromptLogprobs) -> None:
    """A prompt that was cut goes on where the part before ended."""
    if prompts and prompts[-1].row == row:
        before = prompts.pop()
        part = PromptLogprobs(row, before.start, _joined([before.logprobs, part.logprobs]))
    prompts.append(PromptLogprobs(row, part.start, part.logprobs))


def _joined(parts: Sequence[Logprobs]) -> Logprobs:
    return Logprobs(
        b"".join(part.counts for part in parts),
        b"".join(part.token_ids for part in parts),
        b"".join(part.values for part in parts),
        b"".join(part.ranks for part in parts),
    )


def _shifted(fields: Sequence[bytes], firsts: Sequence[int]) -> bytes:
    """Rows of parts → rows of the whole."""
    rows = [np.frombuffer(field, "<i4") + first for field, first in zip(fields, firsts, strict=True)]
    return np.concatenate(rows).astype("<i4").tobytes()

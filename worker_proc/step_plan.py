"""What a captured pass is told of its step: one copy from the host into tensors that stay where they are.

Counts are known on the host, so it plans where each token goes; ids and block tables are not sent, they are read from
the persistent rows inside the graph (`kernels.triton.step_layout`).
"""

import dataclasses
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from folovllm.worker_proc.kernels.triton.paged_prefill import FIELDS
from folovllm.worker_proc.wire_fields import Ids

_PER_ROW: Final = 7
_RING: Final = 8  # copies on their way at once; the core has at most two steps in flight
_NOBODY: Final = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Scheduled:
    """A step as it is planned, on the host.

    Attributes:
        slots: [R]; those that decode first.
        query_lens: [R] tokens of each in this step.
        seq_lens: [R] tokens of each with these.
        num_decodes: the first this many have one token.
        samples: [S] which of the R requests sample.
    """

    slots: Ids
    query_lens: Ids
    seq_lens: Ids
    num_decodes: int
    samples: Ids

    @property
    def num_chunk_tokens(self) -> int:
        """Tokens of the requests that do not decode."""
        return int(self.query_lens[self.num_decodes :].sum())


@dataclasses.dataclass(frozen=True, slots=True)
class PassInputs:
    """What a pass reads, made from the plan on the device.

    Attributes:
        input_ids, positions: int64 [T].
        places: int64 [T]; block id · block_size + place in the block; -1 for padding.
        tiles: int32 [n, 8].
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    tiles: torch.Tensor

    @classmethod
    def empty(cls, num_tokens: int, num_tiles: int, device: torch.device) -> "PassInputs":
        """Room for so many; all of it can be computed with."""
        ids, positions, places = (torch.zeros(num_tokens, dtype=torch.int64, device=device) for _ in range(3))
        return cls(ids, positions, places, torch.zeros(num_tiles, FIELDS, dtype=torch.int32, device=device))


class StepPlan:
    """Room for the plan of one step after the other. All tensors are int64.

    Attributes:
        decode_slots, decode_lens: [most]; of requests that decode, and their tokens with the new one; 0 for padding.
        slots, ends: [most]; of all requests, and their tokens once the step is through; slot -1 for padding.
        sampling_tokens: [most]; which token of the pass is the last of each request that samples; 0 for padding.
        sampling_slots, sampling_lens: [most]; these requests, and their tokens; slot -1 for padding.
        end: [1]; tokens of the pass from here on are padding.
        tiles: [max_tiles, 8]; of no token for padding.
    """

    def __init__(self, most: int, max_tiles: int, device: torch.device) -> None:
        """`most` requests and `max_tiles` tiles in a step."""
        self._most, per_row = most, _PER_ROW * most
        size = per_row + 1 + max_tiles * FIELDS
        self._numbers = torch.zeros(size, dtype=torch.int64, device=device)
        (
            self.decode_slots,
            self.decode_lens,
            self.slots,
            self.ends,
            self.sampling_tokens,
            self.sampling_slots,
            self.sampling_lens,
        ) = self._numbers[:per_row].view(_PER_ROW, most)
        self.end = self._numbers[per_row : per_row + 1]
        self.tiles = self._numbers[per_row + 1 :].view(max_tiles, FIELDS)
        on_gpu = device.type == "cuda"
        self._staging = [torch.zeros(size, dtype=torch.int64, pin_memory=on_gpu) for _ in range(_RING)]
        self._copied = [torch.cuda.Event() if on_gpu else None for _ in range(_RING)]
        self._turn = 0
        self.clear()

    def clear(self) -> None:
        """A plan of nothing but padding: a pass may run with it, and changes nothing."""
        self._numbers.zero_()
        self.slots.fill_(_NOBODY)
        self.sampling_slots.fill_(_NOBODY)

    def fill(self, step: Scheduled, decodes: int, tiles: npt.NDArray[np.int32], num_tiles: int) -> None:
        """Sends the plan of a step.

        Args:
            step: at most `decodes` requests of it decode.
            decodes: requests that the pass has room for before the chunks' tokens.
            tiles: [≤ num_tiles, 8], first tokens counted with that room.
            num_tiles: that the pass looks at.
        """
        staging, copied = self._staging[self._turn], self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        host, per_row, count = staging.numpy(), _PER_ROW * self._most, step.num_decodes
        decode_slots, decode_lens, slots, ends, tokens, sampling_slots, lens = host[:per_row].reshape(_PER_ROW, -1)
        decode_slots[:count], decode_lens[:count] = step.slots[:count], step.seq_lens[:count]
        decode_lens[count:decodes] = 0
        num_requests, num_samples = len(step.slots), len(step.samples)
        slots[:num_requests], ends[:num_requests] = step.slots, step.seq_lens
        slots[num_requests:] = _NOBODY
        last = np.arange(num_requests)
        last[count:] = decodes - 1 + np.cumsum(step.query_lens[count:])
        tokens[:num_samples], tokens[num_samples:] = last[step.samples], 0
        sampling_slots[:num_samples], lens[:num_samples] = step.slots[step.samples], step.seq_lens[step.samples]
        sampling_slots[num_samples:] = _NOBODY
        host[per_row] = decodes + step.num_chunk_tokens
        used = per_row + 1 + num_tiles * FIELDS
        planned = host[per_row + 1 : used].reshape(-1, FIELDS)
        planned[: len(tiles)], planned[len(tiles) :] = tiles, 0
        self._numbers[:used].copy_(staging[:used], non_blocking=True)
        if copied is not None:
            copied.record()
        self._turn = (self._turn + 1) % _RING

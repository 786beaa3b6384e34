"""What a decode step takes from the persistent rows, in one launch. Reference: `InputBatchBuilder.build`."""

import torch
import triton
import triton.language as tl

_BLOCK = 128


def gather_decode_inputs(
    slots: torch.Tensor,
    num_computed: torch.Tensor,
    token_ids: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Reads each request's next token and counts it as computed.

    Args:
        slots: int64 [R]; below 0 for padding, which gets token 0 at position 0 and the length 0.
        num_computed: int64 [num_slots]; one is added to each of `slots`.
        token_ids: int32 [num_slots, max_model_len].
        input_ids, positions, seq_lens: int64 [R], written.
    """
    rows = slots.shape[0]
    _gather[(triton.cdiv(rows, _BLOCK),)](
        slots, num_computed, token_ids, input_ids, positions, seq_lens, rows, token_ids.stride(0), _BLOCK
    )


@triton.jit
def _gather(
    slots_ptr, computed_ptr, tokens_ptr, ids_ptr, positions_ptr, seq_lens_ptr, rows, stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + row, mask=row < rows, other=-1)
    live = slot >= 0
    position = tl.load(computed_ptr + slot, mask=live, other=0)
    token = tl.load(tokens_ptr + slot * stride + position, mask=live, other=0)
    tl.store(ids_ptr + row, token.to(tl.int64), mask=row < rows)
    tl.store(positions_ptr + row, position, mask=row < rows)
    tl.store(seq_lens_ptr + row, tl.where(live, position + 1, 0), mask=row < rows)
    tl.store(computed_ptr + slot, position + 1, mask=live)

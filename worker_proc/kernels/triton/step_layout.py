"""Lays a step's tokens out for a captured pass, from the persistent rows. Reference: `InputBatchBuilder.build`."""

import torch
import triton
import triton.language as tl

from folovllm.worker_proc.kernels.triton.paged_prefill import FIELDS
from folovllm.worker_proc.step_plan import PassInputs, StepPlan

_BLOCK = 256  # tokens of a program; a tile has no more


def lay_out_step(
    plan: StepPlan,
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    inputs: PassInputs,
    sizes: tuple[int, int, int],
    block_size: int,
) -> None:
    """Writes ids, positions and places of a step's tokens, and counts them as computed.

    Args:
        plan: the step's, on the device.
        rows: token_ids int32 [num_slots, max_model_len], block_table int64 [num_slots, blocks] and num_computed int64
            [num_slots], see `RequestStates`; the last is written.
        inputs: written: ids and positions of all tokens (0 for a decode of padding), the places of the chunks' tokens,
            the tiles.
        sizes: decodes and tokens that the pass has room for, and tiles.
        block_size: tokens of a block.
    """
    token_ids, block_table, num_computed = rows
    decodes, tokens, num_tiles = sizes
    num_padding, most = triton.cdiv(tokens, _BLOCK), plan.slots.shape[0]
    _lay_out[(num_tiles + num_padding + triton.cdiv(most, _BLOCK),)](
        *(plan.decode_slots, plan.decode_lens, plan.slots, plan.ends, plan.end, plan.tiles),
        *(token_ids, block_table, num_computed),
        *(inputs.input_ids, inputs.positions, inputs.places, inputs.tiles),
        *(token_ids.stride(0), block_table.stride(0), decodes, decodes + tokens, most, num_tiles, num_padding),
        FIELDS=FIELDS,
        BLOCK_SIZE=block_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )


@triton.jit
def _lay_out(
    decode_slots_ptr,
    decode_lens_ptr,
    slots_ptr,
    ends_ptr,
    end_ptr,
    planned_ptr,
    tokens_ptr,
    table_ptr,
    computed_ptr,
    ids_ptr,
    positions_ptr,
    places_ptr,
    tiles_ptr,
    tokens_stride,
    table_stride,
    decodes,
    room,
    most,
    num_tiles,
    num_padding,
    FIELDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, index = tl.program_id(0), tl.arange(0, BLOCK)
    if program < num_tiles:
        planned, field = planned_ptr + program * FIELDS, tl.arange(0, FIELDS)
        tl.store(tiles_ptr + program * FIELDS + field, tl.load(planned + field).to(tl.int32))
        slot, first = tl.load(planned), tl.load(planned + 1)
        position, inside = tl.load(planned + 2) + index, index < tl.load(planned + 3)
        token = tl.load(tokens_ptr + slot * tokens_stride + position, mask=inside, other=0)
        block = tl.load(table_ptr + slot * table_stride + position // BLOCK_SIZE, mask=inside, other=0)
        tl.store(ids_ptr + first + index, token.to(tl.int64), mask=inside)
        tl.store(positions_ptr + first + index, position, mask=inside)
        tl.store(places_ptr + first + index, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=inside)
    elif program < num_tiles + num_padding:
        at = tl.load(end_ptr) + (program - num_tiles) * BLOCK + index
        tl.store(places_ptr + at, -1, mask=at < room)
    else:
        row = (program - num_tiles - num_padding) * BLOCK + index
        slot = tl.load(slots_ptr + row, mask=row < most, other=-1)
        end = tl.load(ends_ptr + row, mask=row < most, other=0)
        tl.store(computed_ptr + slot, end, mask=slot >= 0)
        seq_len = tl.load(decode_lens_ptr + row, mask=row < decodes, other=0)
        live, position = seq_len > 0, tl.maximum(seq_len - 1, 0)
        slot = tl.load(decode_slots_ptr + row, mask=live, other=0)
        token = tl.load(tokens_ptr + slot * tokens_stride + position, mask=live, other=0)
        tl.store(ids_ptr + row, token.to(tl.int64), mask=row < decodes)
        tl.store(positions_ptr + row, position, mask=row < decodes)

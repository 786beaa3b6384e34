"""The layout's arithmetic; what is computed with it is tested in layers/test_int4_linear.py."""

import pytest
import torch

from folovllm.worker_proc.kernels.cpu.int4 import can_look_up
from folovllm.worker_proc.layers.int4_layout import LANES, Int4Layout
from folovllm.worker_proc.layers.int4_linear import pack_blocks


@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_block_is_words_then_scales_then_zeros(asymmetric: bool) -> None:
    layout = Int4Layout(16, asymmetric)
    numbers = torch.arange(32, dtype=torch.uint8)[:, None].expand(32, 20) % 16  # number k of every output is k
    scales = torch.arange(40, dtype=torch.float32).view(2, 20)
    zeros = torch.full((2, 20), 11, dtype=torch.uint8)
    blocks, weight = pack_blocks(numbers, zeros, scales, layout)
    assert (weight.num_blocks, weight.in_features, weight.out_features) == (2, 32, 20)
    assert weight.address == blocks.data_ptr() and blocks.shape == (2, layout.block_bytes(32))
    words = blocks[1, : 4 * LANES * 4].view(torch.int32).view(4, LANES)
    assert [f"{word & 0xFFFFFFFF:x}" for word in words[:, 0].tolist()] == ["76543210", "fedcba98"] * 2
    assert not words[:, 4:].any()  # outputs 20 to 31, which there are none of
    stored = blocks[1, 4 * LANES * 4 :].view(torch.float16).view(-1, LANES)
    assert stored[:2, :4].tolist() == [[16, 17, 18, 19], [36, 37, 38, 39]] and not stored[:2, 4:].any()
    assert stored[2:].tolist() == ([[3] * 4 + [0] * 12] * 2 if asymmetric else [])


def test_whether_the_processor_can_look_numbers_up_is_known() -> None:
    assert can_look_up() in (True, False)

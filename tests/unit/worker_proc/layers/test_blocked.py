"""What oneDNN packs is read back number by number, or not at all."""

import pytest
import torch

from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.layers import blocked
from folovllm.worker_proc.layers.blocked import BlockedWeight, BlockLayout, look_into
from folovllm.worker_proc.layers.linear import Linear
from tests.fakes.blocked import packs_in_blocks

SIZES = [(64, 64), (960, 576), (100, 70), (200, 33), (16, 96), (199, 64), (1, 32)]


def random_weight(out_features: int, in_features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out_features)
    return torch.randn(out_features, in_features, generator=generator).bfloat16()


needs_packing = pytest.mark.skipif(not packs_in_blocks(), reason="oneDNN makes no blocks on this processor")


def numbers_of(weight: BlockedWeight, packed: torch.Tensor) -> torch.Tensor:
    """The weight [out, in] as kernels read it: from the address, with the layout."""
    import ctypes

    layout = weight.layout
    assert isinstance(layout, BlockLayout)
    size = weight.num_blocks * layout.width * weight.padded_in
    assert size * 2 == torch.ops.mkldnn._nbytes(packed)
    memory = torch.frombuffer((ctypes.c_int16 * size).from_address(weight.address), dtype=torch.bfloat16)
    blocks = memory.view(weight.num_blocks, weight.padded_in // layout.group, layout.width, layout.group)
    rows = blocks.permute(0, 2, 1, 3).reshape(-1, weight.padded_in)
    assert not rows[weight.out_features :].any() and not rows[:, weight.in_features :].any()
    return rows[: weight.out_features, : weight.in_features]


@needs_packing
@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
def test_every_number_is_found(out_features: int, in_features: int) -> None:
    weight = random_weight(out_features, in_features)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    found = look_into(packed, weight)
    assert found is not None
    assert (found.out_features, found.in_features) == (out_features, in_features)
    assert torch.equal(numbers_of(found, packed), weight)


@needs_packing
def test_a_layout_that_is_none_of_the_known_ones_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(960, 576)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    assert look_into(packed, weight.roll(1, 0)) is None
    assert look_into(packed, weight.roll(1, 1)) is None
    found = look_into(packed, weight)
    assert found is not None
    monkeypatch.setattr(blocked, "_WIDTHS", tuple({16, 32, 48, 64} - {found.layout.width}))
    assert look_into(packed, weight) is None


@needs_packing
def test_a_linear_layer_says_where_its_numbers_are() -> None:
    layer = Linear(48, {"q": 64, "k": 16}, Placement(torch.device("cpu"), torch.bfloat16))
    weight = random_weight(80, 48)
    layer.weight.copy_(weight)
    layer.pack()
    assert layer.blocked is not None
    assert torch.equal(numbers_of(layer.blocked, layer.weight), weight)
    unpacked = Linear(48, {"q": 64}, Placement(torch.device("cpu"), torch.float32))
    unpacked.pack()
    assert unpacked.blocked is None

import math

import pytest
import torch

from folovllm.common.model_config import RopeConfig
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.layers.rotary import RotaryTable, rope_frequencies, rotate_into

FLOAT32 = Placement(torch.device("cpu"), torch.float32)


def test_rotation_is_a_turn_in_each_plane() -> None:
    table = RotaryTable(RopeConfig(theta=100.0), 4, 16, FLOAT32)
    heads = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(heads)
    rotate_into(out, heads, *table.rows(torch.tensor([5, 11])))
    for token, position in enumerate([5, 11]):
        for head in range(3):
            for pair, frequency in enumerate([1.0, 0.1]):
                first, second = heads[token, head, pair].item(), heads[token, head, pair + 2].item()
                cos, sin = math.cos(position * frequency), math.sin(position * frequency)
                assert out[token, head, pair].item() == pytest.approx(first * cos - second * sin, abs=1e-5)
                assert out[token, head, pair + 2].item() == pytest.approx(second * cos + first * sin, abs=1e-5)


def test_rotation_in_place_of_a_strided_view_touches_nothing_else() -> None:
    table = RotaryTable(RopeConfig(), 8, 32, FLOAT32)
    heads = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    before = heads.clone()
    expected = torch.empty(3, 4, 8)
    rows = table.rows(torch.tensor([0, 7, 31]))
    rotate_into(expected, before[:, :4], *rows)
    rotate_into(heads[:, :4], heads[:, :4], *rows)
    assert torch.equal(heads[:, :4], expected) and torch.equal(heads[:, 4:], before[:, 4:])
    assert torch.equal(expected[0], before[0, :4])  # position 0 is not turned


def test_dynamic_changes_nothing_up_to_the_original_length() -> None:
    rope = RopeConfig(rope_type="dynamic", factor=4.0, original_max_position_embeddings=64)
    plain, _ = rope_frequencies(RopeConfig(), 16, 64)
    for length in (10, 64):
        assert torch.equal(rope_frequencies(rope, 16, length)[0], plain)
    beyond, _ = rope_frequencies(rope, 16, 128)
    assert beyond[0] == plain[0] and (beyond[1:] < plain[1:]).all()


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    rope = RopeConfig(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192, theta=500000.0)
    plain, _ = rope_frequencies(RopeConfig(theta=500000.0), 128, 1)
    scaled, _ = rope_frequencies(rope, 128, 1)
    waves = 2 * math.pi / plain
    assert torch.equal(scaled[waves < 2048], plain[waves < 2048])
    torch.testing.assert_close(scaled[waves > 8192], plain[waves > 8192] / 8)
    between = (waves > 2048) & (waves < 8192)
    assert between.any() and ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()


def test_yarn_scale() -> None:
    yarn = RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    assert rope_frequencies(yarn, 16, 1)[1] == pytest.approx(0.1 * math.log(4) + 1)
    given = RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.5)
    assert rope_frequencies(given, 16, 1)[1] == 1.5
    whole = RopeConfig(rope_type="yarn", factor=1.0, original_max_position_embeddings=64)
    assert rope_frequencies(whole, 16, 1)[1] == 1.0

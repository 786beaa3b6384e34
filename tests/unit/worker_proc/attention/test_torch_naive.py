"""The reference itself, against attention written out with plain numbers."""

import math

import pytest
import torch

from folovllm.worker_proc.attention.torch_naive import TorchNaiveBackend
from tests.fakes.attention import PagedRequest, build_metadata
from tests.unit.worker_proc.attention.test_paged import HEAD_DIM, make_kv


def test_one_head_by_hand() -> None:
    kv = make_kv(1, 3, 2)
    tokens = torch.randn(3, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0))  # query, key, value of 3 tokens
    metadata = build_metadata([PagedRequest([2, 1])], [3], 2)
    output = TorchNaiveBackend().begin_step(kv, metadata).attend(0, tokens[:, :1], tokens[:, 1:])
    for position in range(3):
        scores = [
            sum((tokens[position, 0] * tokens[past, 1]).tolist()) / math.sqrt(HEAD_DIM) for past in range(position + 1)
        ]
        weights = [math.exp(score) for score in scores]
        for dimension in range(HEAD_DIM):
            by_hand = sum(w * tokens[past, 2, dimension].item() for past, w in enumerate(weights)) / sum(weights)
            assert output[position, dimension].item() == pytest.approx(by_hand, abs=1e-5)


def test_keys_and_values_land_in_their_slots() -> None:
    kv = make_kv(2, 4, 2)
    metadata = build_metadata([PagedRequest([3, 1], num_computed=1)], [2], 2)
    heads = torch.randn(2, 6, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    TorchNaiveBackend().begin_step(kv, metadata).attend(1, heads[:, :2], heads[:, 2:])
    assert torch.equal(kv.layer(1)[0, :, 3, 1], heads[0, 2:4])
    assert torch.equal(kv.layer(1)[1, :, 1, 0], heads[1, 4:])
    assert not kv.layer(0).any() and kv.layer(1).count_nonzero() == 2 * 4 * HEAD_DIM

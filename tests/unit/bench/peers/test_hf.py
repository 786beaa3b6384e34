"""transformers as a peer, on a model of two layers."""

import pathlib

import pytest
import torch

from bench.peers import hf
from bench.peers.peer import Options
from tests.fakes.tiny_models import make_model


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> hf.Transformers:
    folder: pathlib.Path = make_model(tmp_path_factory.mktemp("model"), "llama", dtype=torch.bfloat16)
    return hf.open_peer(Options(str(folder), str(folder), torch.get_num_threads()))


def test_answers_have_their_length_whatever_their_tokens(peer: hf.Transformers) -> None:
    answer = peer.answer([[5, 6, 7, 8]], 40)
    assert [len(ids) for ids in answer.token_ids] == [40]
    assert answer.prompts == [[5, 6, 7, 8]]
    assert 0 < answer.first_s < answer.seconds


def test_prompts_of_different_lengths_go_into_one_batch(peer: hf.Transformers) -> None:
    prompts = [[5, 6, 7, 8], [9, 10]]
    answer = peer.answer(prompts, 3)
    assert answer.prompts == prompts
    assert [len(ids) for ids in answer.token_ids] == [3, 3]
    assert answer.token_ids[0] == peer.answer(prompts[:1], 3).token_ids[0]


def test_one_token_is_the_prompts_alone(peer: hf.Transformers) -> None:
    assert [len(ids) for ids in peer.answer([[5, 6]], 1).token_ids] == [1]

"""This engine and its worker alone, as the processes that the comparison starts."""

import pathlib
import sys

import pytest
import torch

from bench.peers.catalog import KINDS, command_for
from bench.peers.process import ROOT, PeerProcess
from bench.peers.work import Work, check
from folovllm.common.config import child_environment
from tests.fakes.tiny_models import make_model

_BOUND_S = 60.0
_SIZES = {"threads": 1, "max_model_len": 64, "max_num_seqs": 3}
_WORK = Work("small", "three requests", 3, 10, 5, "output")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["own", "bare"])
def test_it_answers_what_it_is_asked(name: str, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    command = command_for(KINDS[name], sys.executable, folder, folder, _SIZES)
    peer = PeerProcess(command, child_environment(str(ROOT)), tmp_path / "log")
    try:
        assert peer.wait_ready(_BOUND_S)
        for turn in range(2):  # stopped and continued in between
            prompts = [[50 * turn + 10 * i + j for j in range(10)] for i in range(3)]
            answer = peer.ask(prompts, _WORK.output_len, _BOUND_S)
            check(_WORK, prompts, answer)
            assert 0 < answer.first_s <= answer.seconds
    finally:
        peer.stop()

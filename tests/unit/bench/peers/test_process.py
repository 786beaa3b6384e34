"""A peer's process: questions, faults, and that it stands still between questions."""

import contextlib
import pathlib
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from bench.peers.peer import PeerError
from bench.peers.process import PeerProcess

_BOUND_S = 30.0

# Answers as it is told by the first id of the first prompt.
_PEER = """
import json, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
say = lambda message: print(json.dumps(message), flush=True)
say({"version": "fake 1"})
for line in sys.stdin:
    asked = json.loads(line)
    told = asked["prompts"][0][0]
    if told == 1:
        say({"error": "ValueError: too long"})
    elif told == 2:
        print("a warning\\n\\nno memory left\\n\\n", file=sys.stderr)
        sys.exit(7)
    elif told == 3:
        sys.stdin.read()
        say({"seconds": 3.5, "first_s": 0.5, "prompts": [[3]], "token_ids": [[3]]})
    else:
        answers = [[told] * asked["num_tokens"] for _ in asked["prompts"]]
        say({"seconds": 1.5, "first_s": 0.5, "prompts": asked["prompts"], "token_ids": answers})
"""


def started(code: str, folder: pathlib.Path) -> PeerProcess:
    return PeerProcess([sys.executable, "-S", "-c", code], None, folder / "log")


@pytest.fixture
def peer(tmp_path: pathlib.Path) -> Iterator[PeerProcess]:
    with contextlib.closing(_Closing(started(_PEER, tmp_path))) as closing:
        assert closing.peer.wait_ready(_BOUND_S) == "fake 1"
        yield closing.peer


class _Closing:
    def __init__(self, peer: PeerProcess) -> None:
        self.peer = peer

    def close(self) -> None:
        self.peer.stop()


def test_an_answer_comes_back_as_it_was_given(peer: PeerProcess) -> None:
    answer = peer.ask([[9, 8], [7]], 3, _BOUND_S)
    assert answer == (1.5, 0.5, [[9, 8], [7]], [[9] * 3] * 2)
    assert peer.ask([[10]], 1, _BOUND_S).token_ids == [[10]]


def test_long_lines_come_whole(peer: PeerProcess) -> None:
    prompts = [[1000 + i for i in range(7000)] for _ in range(16)]
    assert peer.ask(prompts, 2, _BOUND_S).prompts == prompts


def test_between_questions_it_and_its_children_stand_still(peer: PeerProcess) -> None:
    peer.ask([[9]], 1, _BOUND_S)
    processes = [each for each in psutil.Process().children(recursive=True) if _PEER in each.cmdline()]
    processes += [child for each in processes for child in each.children()]
    assert len(processes) == 2
    end_s = time.monotonic() + _BOUND_S
    while {process.status() for process in processes} != {psutil.STATUS_STOPPED}:  # the kernel takes its time
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_an_error_is_told_and_the_next_question_is_answered(peer: PeerProcess) -> None:
    with pytest.raises(PeerError, match="ValueError: too long"):
        peer.ask([[1]], 1, _BOUND_S)
    assert peer.ask([[9]], 1, _BOUND_S).token_ids == [[9]]


def test_an_end_is_told_with_the_last_words(peer: PeerProcess) -> None:
    with pytest.raises(PeerError, match="exit code 7; it said last: no memory left"):
        peer.ask([[2]], 1, _BOUND_S)
    with pytest.raises(PeerError, match="exit code 7"):
        peer.ask([[9]], 1, _BOUND_S)


def test_silence_is_bounded(peer: PeerProcess) -> None:
    with pytest.raises(PeerError, match="no answer after 0 s"):
        peer.ask([[3]], 1, 0.05)


def test_a_late_answer_is_not_the_next_questions(peer: PeerProcess) -> None:
    """The peer answers at the very moment at which it is stopped, since that ends its input."""
    with pytest.raises(PeerError, match="no answer after 0 s"):
        peer.ask([[3]], 1, 0.05)
    with pytest.raises(PeerError, match="it was stopped, since an earlier question had no answer after 0 s"):
        peer.ask([[9]], 1, _BOUND_S)


def test_a_peer_that_cannot_be_opened_says_why(tmp_path: pathlib.Path) -> None:
    peer = started('print(\'{"error": "ImportError: no torch"}\')', tmp_path)
    with pytest.raises(PeerError, match="ImportError: no torch"):
        peer.wait_ready(_BOUND_S)
    peer.stop()


def test_stopping_ends_the_children_too(tmp_path: pathlib.Path) -> None:
    peer = started(_PEER, tmp_path)
    peer.wait_ready(_BOUND_S)
    peer.ask([[9]], 1, _BOUND_S)
    mine = [each for each in psutil.Process().children(recursive=True) if _PEER in each.cmdline()]
    below = [child for each in mine for child in each.children()]
    peer.stop()
    _, left = psutil.wait_procs([*mine, *below], timeout=_BOUND_S)
    assert below
    assert not left
    peer.stop()

"""A worker's loop, with peers that are made up."""

import json
import pathlib
import subprocess
import sys
from typing import Any

from bench.peers.peer import Answer
from bench.peers.worker import serve
from tests.sources import ROOT


class FakePeer:
    version = "fake 1"

    def answer(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        if num_tokens == 0:
            raise ValueError("nothing\nasked for")
        return Answer(2.0, 1.0, prompts, [[4] * num_tokens for _ in prompts])


def question(num_tokens: int) -> str:
    return json.dumps({"prompts": [[1, 2]], "num_tokens": num_tokens})


def test_questions_are_answered_until_there_are_none() -> None:
    said: list[dict[str, Any]] = []
    serve(FakePeer, [question(2), question(1)], said.append)
    assert said == [
        {"version": "fake 1"},
        {"seconds": 2.0, "first_s": 1.0, "prompts": [[1, 2]], "token_ids": [[4, 4]]},
        {"seconds": 2.0, "first_s": 1.0, "prompts": [[1, 2]], "token_ids": [[4]]},
    ]


def test_a_failure_is_told_in_one_line_and_the_next_question_taken() -> None:
    said: list[dict[str, Any]] = []
    serve(FakePeer, [question(0), question(1)], said.append)
    assert said[1] == {"error": "ValueError: nothing asked for"}
    assert said[2]["token_ids"] == [[4]]


def test_a_peer_that_cannot_be_opened_is_asked_nothing() -> None:
    def fail() -> FakePeer:
        raise ModuleNotFoundError("No module named 'vllm'")

    said: list[dict[str, Any]] = []
    serve(fail, [question(1)], said.append)
    assert said == [{"error": "ModuleNotFoundError: No module named 'vllm'"}]


def test_what_libraries_print_does_not_mix_with_answers() -> None:
    code = "import os; from bench.peers.worker import own_stdout; a = own_stdout(); print('noise'); os.write(1, b'raw')"
    code += "; print('answer', file=a, flush=True)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "answer\n"
    assert sorted(done.stderr.split()) == ["noise", "raw"] or done.stderr == "rawnoise\n"


def test_it_needs_nothing_but_the_standard_library(tmp_path: pathlib.Path) -> None:
    """Other peers' interpreters have none of this project's packages."""
    options = [f"--{name}=1" for name in ("model", "form", "threads", "max-model-len", "max-num-seqs")]
    for name, missing in (("hf", "torch"), ("vllm_cpu", "vllm"), ("llamacpp", "llama_cpp"), ("openvino", "openvino")):
        command = [sys.executable, "-S", "-m", "bench.peers.worker", name, *options]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL
        )
        assert json.loads(done.stdout) == {"error": f"ModuleNotFoundError: No module named '{missing}'"}

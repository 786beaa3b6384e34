"""`LLM` through all three processes, on a tiny model."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
from typing import Any

import psutil
import pytest

from folovllm import LLM, RequestError, SamplingParams
from tests.fakes.model_folder import VOCAB_SIZE, ids_of
from tests.integration.conftest import ROOT, Daemon, eventually, is_idle

RANDOM: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True}


def texts(llm: LLM, prompts: list[str], params: SamplingParams | list[SamplingParams]) -> list[list[str]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[answer.text for answer in output.outputs] for output in outputs]


def test_many_prompts_in_order_and_metrics(llm: LLM) -> None:
    prompts = [f"prompt {i}" for i in range(40)]
    params = [SamplingParams(max_tokens=1 + i % 7, ignore_eos=True) for i in range(40)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1 + i % 7 for i in range(40)]
    for output in outputs:
        assert output.metrics is not None
        assert output.metrics.time_to_first_token is not None
        assert output.metrics.total_time is not None
        assert output.metrics.time_to_first_token <= output.metrics.total_time
    assert is_idle(llm)


def test_no_token_beyond_the_tokenizers_ids_is_sampled(llm: LLM) -> None:
    ids = llm.generate(["a"] * 8, SamplingParams(max_tokens=60, temperature=2.0, ignore_eos=True), use_tqdm=False)
    largest = max(max(output.outputs[0].token_ids) for output in ids)
    assert largest < llm.get_tokenizer().num_ids < VOCAB_SIZE


def test_text_streamed_equals_text_whole(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=80, ignore_eos=True)
    whole = llm.generate("é世", params, use_tqdm=False)[0].outputs[0]
    deltas = [delta.outputs[0] for delta in llm.stream("é世", params)]
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert deltas[-1].finish_reason == whole.finish_reason == "length"


def test_L09_n_samples_and_seeds(llm: LLM) -> None:
    four = SamplingParams(**RANDOM, n=4, seed=7)
    first, second = texts(llm, ["abc"], four)[0], texts(llm, ["abc"], four)[0]
    assert first == second
    assert len(set(first)) == 4
    one, other = texts(llm, ["abc", "abc"], SamplingParams(**RANDOM))
    assert one != other
    seeded = SamplingParams(**RANDOM, seed=42)
    alone = texts(llm, ["abc"], seeded)[0]
    beside = texts(llm, ["abc", "xyz", "abc"], [SamplingParams(**RANDOM), SamplingParams(**RANDOM), seeded])[2]
    assert alone == beside


def test_stops_by_token_and_by_string(llm: LLM) -> None:
    params: dict[str, Any] = {"temperature": 1.0, "seed": 11, "max_tokens": 60, "ignore_eos": True}
    free = llm.generate("abc", SamplingParams(**params), use_tqdm=False)[0].outputs[0]
    token = free.token_ids[20]
    first = list(free.token_ids).index(token)
    stopped = llm.generate("abc", SamplingParams(**params, stop_token_ids=[token]), use_tqdm=False)[0].outputs[0]
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)
    string = next(character for character in free.text[5:] if character.isascii())
    cut = llm.generate("abc", SamplingParams(**params, stop=[string]), use_tqdm=False)[0].outputs[0]
    assert cut.text == free.text[: free.text.index(string)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", string)
    assert eventually(lambda: is_idle(llm))


def test_L17_prompts_up_to_the_models_length(llm: LLM) -> None:
    (output,) = llm.generate([1] * 511, SamplingParams(max_tokens=None), use_tqdm=False)
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (1, "length")
    for length in (512, 513):
        with pytest.raises(RequestError, match=rf"the prompt has {length} tokens.*512"):
            llm.generate([1] * length, use_tqdm=False)
    (output,) = llm.generate("a", SamplingParams(max_tokens=0), use_tqdm=False)
    assert output.outputs[0].token_ids == []


def test_L34_a_bad_prompt_leaves_nothing(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"prompts\[2\]"):
        llm.generate(["ok", "ok", "x" * 600], use_tqdm=False)
    assert is_idle(llm)
    assert len(llm.generate(["p"], SamplingParams(max_tokens=2), use_tqdm=False)) == 1


def test_L34_ctrl_c_in_the_middle_leaves_nothing(daemon: Daemon) -> None:
    """Another frontend sees the requests run, and then interrupts this process."""
    watching, ready = LLM(engine=daemon.endpoint), threading.Event()

    def interrupt_once_running() -> None:
        ready.set()
        if eventually(lambda: watching.get_stats().num_running > 0, timeout_s=30):
            os.kill(os.getpid(), signal.SIGINT)

    long = SamplingParams(max_tokens=500, ignore_eos=True)
    with watching, LLM(engine=daemon.endpoint) as llm:
        thread = threading.Thread(target=interrupt_once_running)
        thread.start()
        assert ready.wait(30)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a"] * 2000, long, use_tqdm=False)  # a minute's work: it is interrupted, however late
        thread.join()
        assert eventually(lambda: is_idle(llm))
        (output,) = llm.generate(["p"], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 2


def test_L22_streams_that_are_broken_off_leave_nothing(llm: LLM) -> None:
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    for _ in range(30):
        with llm.stream("abc", params) as stream:
            next(stream)
    queued = [llm.stream("abc", params) for _ in range(300)]  # more than run at once
    for stream in queued:
        stream.close()
    assert eventually(lambda: is_idle(llm))
    assert not llm._open.outputs.live
    assert len(llm.generate("abc", SamplingParams(max_tokens=3), use_tqdm=False)) == 1


def test_L37_1500_requests_at_once_over_one_connection(llm: LLM) -> None:
    descriptors = psutil.Process().num_fds()
    outputs = llm.generate([[i % 256, 1] for i in range(1500)], SamplingParams(max_tokens=1), use_tqdm=False)
    assert [output.prompt_token_ids[0] for output in outputs] == [i % 256 for i in range(1500)]
    assert psutil.Process().num_fds() <= descriptors


SCRIPT = """
import sys
from folovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], load_format="dummy", dtype="float32", num_gpu_blocks_override=64, cpu_threads=1)
output = llm.generate("abc", SamplingParams(max_tokens=3, temperature=0, ignore_eos=True), use_tqdm=False)[0]
print(list(output.outputs[0].token_ids))
stream = llm.stream("abc", SamplingParams(max_tokens=400, ignore_eos=True))  # still open at the end
next(stream)
"""


def test_L37_a_script_on_stdin_with_a_long_tmpdir(tiny_folder: pathlib.Path, tmp_path: pathlib.Path, llm: LLM) -> None:
    """No `__main__` guard, no close, a second engine beside another one, and a folder too long for a socket's path."""
    long = tmp_path / ("t" * 120)
    long.mkdir()
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-", str(tiny_folder)],
        input=SCRIPT,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(long)},
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Unclosed" not in done.stderr
    assert "Exception ignored" not in done.stderr
    greedy = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    assert done.stdout.strip() == str(llm.generate(ids_of("abc"), greedy, use_tqdm=False)[0].outputs[0].token_ids)
    assert list(long.iterdir()) == []


def test_the_table_explains_the_start(llm: LLM) -> None:
    startup = llm.startup
    assert {phase.process for phase in startup.phases} == {"frontend", "core", "worker-0"}
    assert startup.unexplained_s < startup.wall_s / 2  # 0.05 s of 4 s; a share, as a busy machine stretches both
    assert {use.purpose for use in startup.memory} >= {"weights", "KV cache"}
    assert all(phase.seconds >= 0 and 0 <= phase.start_s <= startup.wall_s for phase in startup.phases)

"""The server against `LLM.generate`: the same work, on the same engine, by turns.

    python -m bench.server_streams [--streams 16 64] [--repeats 5]

One engine serves both: an HTTP server that has dialled it, and an LLM in this process. Every turn answers as many
prompts, of equal lengths, once as streams over HTTP and once by one call. All prompts are different, so nothing is
found in the prefix cache. The share is the median of each turn's own ratio.
"""

import argparse
import asyncio
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import cast

import uvloop

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the package, uninstalled

from bench.common import machine, print_table, write_json
from bench.server_overhead import COMPLETIONS, ROOT
from bench.workload import exactly, parser, random_prompts
from folovllm import LLM

_BOUND_S = 300.0
_TAIL_BYTES = 1024  # hold the last event with something in it
_COUNT = re.compile(rb'"completion_tokens":(\d+)')


@dataclass(frozen=True)
class Point:
    """Medians over the turns: tokens/s of both ways, their ratio, and the events that the streams' tokens came in."""

    streams: int
    offline_tokens_per_s: float
    http_tokens_per_s: float
    share: float
    events_per_token: float


@contextmanager
def started(*arguments: str) -> Iterator[str]:
    """A command of folovllm that runs until the end of the block; gives its line that says it is ready."""
    command = [sys.executable, "-m", "folovllm", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield next(line for line in process.stdout if line.startswith("ready"))
        finally:
            process.terminate()


class Stream(asyncio.Protocol):
    """One streamed completion, read with as little work as can be: client and engine share the cores.

    Attributes:
        ended: its tokens, as the server counts them, and its events.
    """

    def __init__(self, prompt: list[int], num_tokens: int) -> None:
        body = {"prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0}
        data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        self._request = head.encode() + data
        self._tail = b""
        self._num_events = 0
        self.ended: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).write(self._request)  # uvloop's is one by its methods alone

    def data_received(self, data: bytes) -> None:
        self._num_events += data.count(b'"text":"')
        self._tail = (self._tail + data)[-_TAIL_BYTES:] if len(data) < _TAIL_BYTES else data[-_TAIL_BYTES:]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        found = _COUNT.search(self._tail)
        self.ended.set_result((int(found[1]) if found else 0, self._num_events))


async def stream_all(port: int, prompts: list[list[int]], num_tokens: int) -> tuple[float, int]:
    """Seconds until all streams have ended, and how many events they had; checks each one's tokens."""
    loop = asyncio.get_running_loop()

    async def one(prompt: list[int]) -> tuple[int, int]:
        _, stream = await loop.create_connection(lambda: Stream(prompt, num_tokens), "127.0.0.1", port)
        return await stream.ended

    began = time.perf_counter()
    results = await asyncio.wait_for(asyncio.gather(*[one(prompt) for prompt in prompts]), _BOUND_S)
    seconds = time.perf_counter() - began
    if [tokens for tokens, _ in results] != [num_tokens] * len(prompts):
        raise RuntimeError("an answer has another length than it was asked for")
    return seconds, sum(events for _, events in results)


def run_streams(port: int, prompts: list[list[int]], num_tokens: int) -> tuple[float, int]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(stream_all(port, prompts, num_tokens))


def generate_all(llm: LLM, prompts: list[list[int]], num_tokens: int) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    outputs = llm.generate(prompts, exactly(num_tokens), use_tqdm=False)
    seconds = time.perf_counter() - began
    if [len(output.outputs[0].token_ids) for output in outputs] != [num_tokens] * len(prompts):
        raise RuntimeError("an answer has another length than it was asked for")
    return seconds


def measure(llm: LLM, port: int, num_streams: int, given: argparse.Namespace) -> Point:
    """Both ways by turns; which one begins changes with each turn."""
    num_tokens = num_streams * given.output_len
    offline, http, events = [], [], []
    for turn in range(given.repeats):
        seed = given.seed + 1000 * num_streams + 2 * turn
        mine, theirs = (random_prompts([given.prompt_len] * num_streams, seed + i) for i in range(2))
        for way in ("offline", "http") if turn % 2 else ("http", "offline"):
            if way == "offline":
                offline.append(num_tokens / generate_all(llm, mine, given.output_len))
            else:
                seconds, num_events = run_streams(port, theirs, given.output_len)
                http.append(num_tokens / seconds)
                events.append(num_events / num_tokens)
        print(
            f"{num_streams} streams, turn {turn + 1}: offline {offline[-1]:.0f}, HTTP {http[-1]:.0f} tokens/s",
            flush=True,
        )
    return Point(
        streams=num_streams,
        offline_tokens_per_s=statistics.median(offline),
        http_tokens_per_s=statistics.median(http),
        share=statistics.median(ours / whole for ours, whole in zip(http, offline, strict=True)),
        events_per_token=statistics.median(events),
    )


def main() -> None:
    options = parser("Streams over HTTP against LLM.generate.")
    options.add_argument("--streams", type=int, nargs="+", default=[16, 64])
    options.add_argument("--prompt-len", type=int, default=64)
    options.add_argument("--output-len", type=int, default=96)
    given = options.parse_args()
    if given.quick:
        given.streams, given.prompt_len, given.output_len, given.repeats = [2], 8, 4, 1
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/engine"
        engine = ["engine", given.model, "--listen", endpoint, "--dtype", given.dtype, "--device", given.device]
        server = ["serve", "--engine", endpoint, "--port", "0", "--no-access-log"]
        with started(*engine, "--log-level", "warning"), started(*server) as ready, LLM(engine=endpoint) as llm:
            port = int(ready.split("/v1")[0].rsplit(":", 1)[1])
            warm = random_prompts([given.prompt_len] * 4, given.seed + 1)
            generate_all(llm, warm, 8)
            run_streams(port, warm, 8)
            points = [measure(llm, port, num_streams, given) for num_streams in given.streams]
    print(f"{given.prompt_len} + {given.output_len} tokens each, {machine()['processor']}")
    rows = [[f"{value:.2f}" if isinstance(value, float) else value for value in asdict(p).values()] for p in points]
    print_table(["streams", "offline tokens/s", "HTTP tokens/s", "share", "events per token"], rows)
    write_json(
        "server_streams" + ("-quick" if given.quick else ""),
        {"options": vars(given), "points": [asdict(point) for point in points]},
    )


if __name__ == "__main__":
    main()

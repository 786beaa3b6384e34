"""20,000 small requests in a row through HTTP, all processes real: the memory of every one of them stays flat.

    python -m bench.soak [--requests 20000] [--clients 8]

A tiny model with random weights, so that what is measured is the engine's own bookkeeping. The requests differ: texts,
token ids and chats, whole and streamed, several answers, log probabilities, schemas, stop strings, streams that are
broken off, bodies that are refused. Every prompt is new, so that the KV cache turns over many times; its words are not,
as in any language, and schemas change often: what is bounded (the tokenizer's 10,000 words, the grammars kept) is full
within the first two thousand requests. Memory (RSS) is read every thousand; what counts is the growth from then on.
"""

import argparse
import asyncio
import itertools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import psutil

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the package and the fakes, uninstalled

from bench.common import print_table, write_json
from bench.server_overhead import CHAT, COMPLETIONS, Connection
from bench.server_streams import started
from folovllm import LLM
from tests.fakes.model_folder import write_model_folder

_TINY = ("--load-format", "dummy", "--dtype", "float32", "--num-gpu-blocks-override", "257", "--cpu-threads", "1")
_EVERY = 1000  # requests between two readings
_WARM_UP = 2000
_BOUND_S = 900.0
_ROLES = {"folovllm.core_proc": "core", "folovllm.worker_proc": "worker", "serve": "server", "engine": "engine"}


def _schema(i: int) -> dict[str, Any]:
    """Another one for every request that has one: they are compiled, and the kept ones replaced."""
    schema = {"type": "object", "properties": {f"p{i}": {"enum": [1, 2]}}, "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


async def ask(connection: Connection, i: int) -> None:
    """Request number `i`. Raises RuntimeError if it is not answered as it must be."""
    text = f"request {i // 10_000} {i // 100 % 100} {i % 100} of many"
    hello = [{"role": "user", "content": text}]
    kind = i % 8
    if kind == 0:
        await connection.whole(COMPLETIONS, {"prompt": text, "max_tokens": 4})
    elif kind == 1:
        await connection.stream({"messages": hello, "max_tokens": 4})
    elif kind == 2:
        await connection.whole(COMPLETIONS, {"prompt": list(text.encode()), "max_tokens": 3, "n": 2, "seed": i})
    elif kind == 3:
        await connection.whole(CHAT, {"messages": hello, "max_tokens": 6, "response_format": _schema(i)})
    elif kind == 4:
        await _refused(connection, {"prompt": text, f"unknown{i}": 1})
    elif kind == 5:
        await connection.whole(CHAT, {"messages": hello, "max_tokens": 4, "logprobs": True, "top_logprobs": 3})
    elif kind == 6:
        await connection.whole("/v1/responses", {"input": text, "max_output_tokens": 4})
    else:
        await connection.stream({"prompt": text, "max_tokens": 8, "stop": [f"stop {i}", "x"]}, COMPLETIONS)


async def _refused(connection: Connection, body: dict[str, Any]) -> None:
    try:
        await connection.whole(COMPLETIONS, body)
    except RuntimeError as error:
        if " 400 " in str(error):
            return
        raise
    raise RuntimeError(f"{body} was not refused")


async def _break_off(port: int, i: int) -> None:
    """A stream whose client goes away behind the first event."""
    async with Connection(port) as connection:
        await connection.send(COMPLETIONS, {"prompt": f"broken off {i}", "max_tokens": 400, "stream": True})
        await connection.chunk()


async def send_many(port: int, numbers: Iterator[int], count: int, num_clients: int) -> None:
    """The next `count` requests, several at a time; every fiftieth is a stream that is broken off."""
    mine = iter(list(itertools.islice(numbers, count)))

    async def client() -> None:
        connection = await Connection(port).__aenter__()
        for i in mine:
            if i % 50 == 49:
                await _break_off(port, i)
                continue
            await ask(connection, i)
            if i % 8 == 4:  # the rest of a refusal was not read
                await connection.__aexit__()
                connection = await Connection(port).__aenter__()
        await connection.__aexit__()

    await asyncio.gather(*[client() for _ in range(num_clients)])


def family() -> dict[str, psutil.Process]:
    """The processes of the engine and the server, by what they are."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        words = process.cmdline()
        role = next((role for word, role in _ROLES.items() if word in words), None)
        if role is not None:
            found[role] = process
    return found


def soak(port: int, num_requests: int, num_clients: int) -> dict[str, Any]:
    """Sends everything; reads memory in between."""
    processes = family()
    if set(processes) != set(_ROLES.values()):
        raise RuntimeError(f"expected {sorted(_ROLES.values())}, found {sorted(processes)}")
    rss_mib: dict[str, list[float]] = {role: [] for role in processes}
    numbers = iter(range(num_requests))
    began = time.perf_counter()
    for _ in range(0, num_requests, _EVERY):
        asyncio.run(asyncio.wait_for(send_many(port, numbers, _EVERY, num_clients), _BOUND_S))
        for role, process in processes.items():
            rss_mib[role].append(process.memory_info().rss / 2**20)
    seconds = time.perf_counter() - began
    warm = _WARM_UP // _EVERY - 1
    growth = {role: 100.0 * (max(values[warm + 1 :]) / values[warm] - 1.0) for role, values in rss_mib.items()}
    return {
        "requests": num_requests,
        "requests_per_s": num_requests / seconds,
        "rss_mib": rss_mib,
        "growth_percent": growth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Many small requests over HTTP; watches every process's memory.")
    parser.add_argument("--requests", type=int, default=20_000, help="a multiple of 1,000, at least 3,000")
    parser.add_argument("--clients", type=int, default=8, help="requests at a time")
    given = parser.parse_args()
    if given.requests < _WARM_UP + _EVERY or given.requests % _EVERY:
        parser.error("--requests must be a multiple of 1,000, at least 3,000")
    with tempfile.TemporaryDirectory() as name:
        folder = write_model_folder(pathlib.Path(name) / "tiny")
        endpoint = f"ipc://{name}/engine"
        engine = ["engine", str(folder), "--listen", endpoint, *_TINY]
        serve = ["serve", "--engine", endpoint, "--port", "0", "--no-access-log"]
        with started(*engine), started(*serve) as ready:
            port = int(ready.split("/v1")[0].rsplit(":", 1)[1])
            result = soak(port, given.requests, given.clients)
            with LLM(engine=endpoint) as llm:
                stats = llm.get_stats()
    result["left_running"], result["left_waiting"] = stats.num_running, stats.num_waiting
    result["blocks_in_use"] = stats.num_blocks - stats.num_free_blocks
    print(json.dumps({name: value for name, value in result.items() if name != "rss_mib"}, indent=1))
    rows = [
        [role, *(f"{values[i]:.1f}" for i in (0, 1, -1)), f"{result['growth_percent'][role]:.2f} %"]
        for role, values in result["rss_mib"].items()
    ]
    print_table(["process", "MiB after 1,000", "after 2,000", "at the end", "most growth"], rows)
    write_json("soak", {"result": result})


if __name__ == "__main__":
    main()

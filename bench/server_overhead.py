"""What HTTP, frontend and core cost together: `folovllm serve` over a core whose worker answers at once.

    python -m bench.server_overhead [--streams 64] [--tokens 2000]

Four processes share the machine: server, core, fake worker, and this one, which speaks HTTP by hand so that it costs
little. Three figures: streamed tokens a second over many streams, and in how many chunks; short requests a second;
the time to the first token of one request alone, all of which is overhead.
"""

import argparse
import asyncio
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the package and the fakes, uninstalled

from bench.common import print_table, write_json
from folovllm.common.config import EngineConfig
from tests.fakes.fake_parent import FakeParent, make_model_dir
from tests.fakes.fake_worker import Script
from tests.fakes.model_folder import write_tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
_HELLO = [{"role": "user", "content": "hello"}]
_BOUND_S = 120.0


class Connection:
    """One HTTP/1.1 connection that is kept open."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> "Connection":
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def send(self, path: str, body: dict[str, Any]) -> dict[str, str]:
        """Sends a request; returns the answer's headers."""
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        self._writer.write(head.encode() + data)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        if " 200 " not in lines[0]:
            raise RuntimeError(lines[0])
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}

    async def whole(self, path: str, body: dict[str, Any]) -> bytes:
        """The body of an answer that is not streamed."""
        headers = await self.send(path, body)
        return await self._reader.readexactly(int(headers["content-length"]))

    async def chunk(self) -> bytes:
        """The next chunk of a streamed answer; empty at its end."""
        size = int(await self._reader.readline(), 16)
        data = await self._reader.readexactly(size + 2)
        return data[:-2]

    async def stream(self, body: dict[str, Any], path: str = CHAT) -> tuple[int, int]:
        """A streamed answer: completion tokens, as the server counts them, and events with text."""
        await self.send(path, body | {"stream": True, "stream_options": {"include_usage": True}})
        field = b'"content":"' if path == CHAT else b'"text":"'
        tail, num_events = b"", 0
        while data := await self.chunk():
            num_events += data.count(field) - data.count(field + b'"')
            tail = data if b'"usage"' in data else tail
        usage = json.loads(tail.split(b"data: ")[-1 if tail.count(b"data: ") == 1 else -2])["usage"]
        return usage["completion_tokens"], num_events


async def streams(port: int, num_streams: int, num_tokens: int) -> dict[str, float]:
    """Many streams at once."""
    body = {"messages": _HELLO, "max_tokens": num_tokens, "ignore_eos": True}

    async def one() -> tuple[int, int]:
        async with Connection(port) as connection:
            return await connection.stream(body)

    began = time.perf_counter()
    results = await asyncio.gather(*[one() for _ in range(num_streams)])
    seconds = time.perf_counter() - began
    tokens, events = (sum(counts) for counts in zip(*results, strict=True))
    return {"tokens_per_s": tokens / seconds, "events_per_s": events / seconds, "seconds": seconds}


async def short_requests(port: int, num_clients: int, num_each: int) -> dict[str, float]:
    """Short requests, each client one after the other."""
    body = {"prompt": "hello", "max_tokens": 4, "ignore_eos": True}

    async def client() -> None:
        async with Connection(port) as connection:
            for _ in range(num_each):
                await connection.whole(COMPLETIONS, body)

    began = time.perf_counter()
    await asyncio.gather(*[client() for _ in range(num_clients)])
    return {"requests_per_s": num_clients * num_each / (time.perf_counter() - began)}


async def first_token(port: int, count: int) -> dict[str, float]:
    """One streamed request alone, again and again: milliseconds to the first event."""
    body = {"messages": _HELLO, "max_tokens": 2, "ignore_eos": True, "stream": True}
    times = []
    async with Connection(port) as connection:
        for _ in range(count):
            began = time.perf_counter()
            await connection.send(CHAT, body)
            data = await connection.chunk()
            times.append((time.perf_counter() - began) * 1e3)
            while data:
                data = await connection.chunk()
    return {"ttft_ms_median": statistics.median(times), "ttft_ms_max": max(times)}


async def measure(port: int, num_streams: int, num_tokens: int) -> dict[str, dict[str, float]]:
    await first_token(port, 20)  # warm-up
    return {
        "first token alone": await first_token(port, 200),
        "short requests": await short_requests(port, 16, 100),
        f"{num_streams} streams": await streams(port, num_streams, num_tokens),
    }


def main() -> None:
    options = argparse.ArgumentParser(description="Overhead of the HTTP server.")
    options.add_argument("--streams", type=int, default=64)
    options.add_argument("--tokens", type=int, default=2000)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model_dir(pathlib.Path(folder) / "model", Script(num_blocks=20_000, check=False))
        write_tokenizer(model)
        config = EngineConfig(model=str(model), log_level="warning", log_interval_s=0)
        with FakeParent() as parent:
            parent.start(config)
            command = [sys.executable, "-m", "folovllm", "serve", "--engine", parent.endpoint, "--port", "0"]
            command += ["--no-access-log"]
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
                assert server.stdout is not None
                line = next(line for line in server.stdout if line.startswith("ready"))
                port = int(line.split("/v1")[0].rsplit(":", 1)[1])
                try:
                    coroutine = asyncio.wait_for(measure(port, given.streams, given.tokens), _BOUND_S)
                    results = asyncio.run(coroutine)
                finally:
                    server.terminate()
    rows = [[what, name, f"{value:,.1f}"] for what, values in results.items() for name, value in values.items()]
    print_table(["what", "figure", "value"], rows)
    write_json("server_overhead", {"results": results})


if __name__ == "__main__":
    main()

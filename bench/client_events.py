"""How many events a second the client of `folovllm bench serve` takes in, and how late it sees them.

    python -m bench.client_events [--streams 16 64 256] [--rate 12000]

A second process sends the events of streamed chats, made beforehand, one write each, and notes when. First as fast as
the client reads: the rate that it sustains, with many events to a read. Then paced: from each write to the client's
reading of its clock (both read the same one), which is what the client adds to a server's latencies.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import cast

import uvloop

from bench.common import machine, print_table, write_json
from bench.workload import percentile
from folovllm.frontend.benchmark.http_request import Record, Target
from folovllm.frontend.benchmark.load import Load, put_load
from folovllm.frontend.benchmark.workload import Work

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1700000000,'
    b'"model":"demo","choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null,"logprobs":null}]}\n\n'
)
_NUMBER = re.compile(rb'"stream (\d+)"')


@dataclass(frozen=True)
class Point:
    """Of one number of streams: the sustained rate; when paced, the rate, reads of sockets a second, and delays."""

    streams: int
    events_per_s: float
    paced_events_per_s: float
    paced_reads_per_s: float
    delay_p50_ms: float
    delay_p99_ms: float


class Sender(asyncio.Protocol):
    """Answers any request with a stream of events: `num_events` of them, `rate` a second (0: as fast as it is read)."""

    def __init__(self, num_events: int, rate: float, written: dict[int, list[float]]) -> None:
        self._num_events = num_events
        self._rate = rate
        self._written = written
        self._may_write = asyncio.Event()
        self._may_write.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods alone
        self._transport.set_write_buffer_limits(high=2048)  # so that it waits for a client that is behind

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def data_received(self, data: bytes) -> None:
        if found := _NUMBER.search(data):
            times = self._written.setdefault(int(found[1]), [])
            self._task = asyncio.ensure_future(self._stream(times))

    async def _stream(self, times: list[float]) -> None:
        self._transport.write(_HEAD)
        began = time.perf_counter()
        for i in range(self._num_events):
            await self._may_write.wait()
            delay = began + i / self._rate - time.perf_counter() if self._rate else 0.0
            await asyncio.sleep(max(delay, 0.0))
            times.append(time.perf_counter())
            self._transport.write(_chunk(_EVENT))
        self._transport.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def serve(num_events: int, rate: float) -> None:
    """Prints its port, serves until standard input ends, then prints when it wrote what."""
    written: dict[int, list[float]] = {}
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Sender(num_events, rate, written), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(json.dumps([times for _, times in sorted(written.items())]))


def run(num_streams: int, num_events: int, rate: float) -> tuple[list[Record], list[list[float]]]:
    """The records of all streams, and when their events were written."""
    command = [sys.executable, "-m", "bench.client_events", "--serve", str(num_events), str(rate)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        target = Target(f"http://127.0.0.1:{int(process.stdout.readline())}/", "chat", "demo", None, {})
        works = [Work(f"stream {i}", 1, num_events) for i in range(num_streams)]
        records = put_load(target, works, Load([0.0] * num_streams), lambda _: None).records
        written: list[list[float]] = json.loads(process.communicate()[0])
    if wrong := [record.error for record in records if record.error or len(record.times) != num_events]:
        raise RuntimeError(f"a stream is not whole: {wrong[0]}")
    return records, written


def seconds_of(records: list[Record]) -> float:
    return max(record.times[-1] for record in records) - min(record.times[0] for record in records)


def measure(num_streams: int, total: int, rate: float) -> Point:
    """Both runs; `total` events are sent by all streams together, `rate` a second in the paced run."""
    num_events = total // num_streams
    records, _ = run(num_streams, num_events, 0.0)
    paced, written = run(num_streams, num_events, rate / num_streams)
    delays = [
        (seen - sent) * 1e3
        for record, times in zip(paced, written, strict=True)
        for seen, sent in zip(record.times, times, strict=True)
    ]
    return Point(
        streams=num_streams,
        events_per_s=num_streams * num_events / seconds_of(records),
        paced_events_per_s=num_streams * num_events / seconds_of(paced),
        paced_reads_per_s=sum(len(set(record.times)) for record in paced) / seconds_of(paced),
        delay_p50_ms=statistics.median(delays),
        delay_p99_ms=percentile(delays, 99),
    )


def main() -> None:
    options = argparse.ArgumentParser(description="Events a second of the benchmark's HTTP client.")
    options.add_argument("--streams", type=int, nargs="+", default=[16, 64, 256])
    options.add_argument("--events", type=int, default=60_000, help="of all streams together")
    options.add_argument("--rate", type=float, default=12_000.0, help="events a second of the paced run")
    options.add_argument("--serve", nargs=2, metavar=("EVENTS", "RATE"), help="be the process that sends")
    given = options.parse_args()
    if given.serve:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(int(given.serve[0]), float(given.serve[1])))
        return
    points = [measure(num_streams, given.events, given.rate) for num_streams in given.streams]
    print(machine()["processor"])
    headers = ["streams", "events/s", "paced events/s", "reads/s", "delay p50 ms", "delay p99 ms"]
    print_table(headers, [[f"{value:,.2f}" for value in asdict(point).values()] for point in points])
    write_json(
        "client_events",
        {"options": {"events": given.events, "rate": given.rate}, "points": [asdict(point) for point in points]},
    )


if __name__ == "__main__":
    main()

"""One streamed request to an OpenAI-compatible server, with the times at which its events came.

The clock is read once for each piece that the socket gives, before anything is parsed. Over 10,000 events a second the
client must not be what is measured (`bench/client_events.py`).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
import msgspec

from folovllm.frontend.benchmark.workload import Work

Backend = Literal["chat", "completions"]
PATHS: dict[Backend, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_SHOWN = 300  # characters of an answer that an error repeats


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw()


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


_DECODER = msgspec.json.Decoder(_Event)


@dataclass(slots=True)
class Record:
    """What became of a request. Times are seconds of one monotonic clock.

    Attributes:
        work: what was asked.
        planned: when it was to be sent; -1 where nothing was planned.
        sent: when it was sent.
        times: when each event with something new came.
        prompt_tokens, output_tokens: as the server counts them; `work.prompt_len` and the number of events where it
            does not.
        error: why it failed; "" as a rule.
    """

    work: Work
    planned: float = -1.0
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go.

    Attributes:
        url: the endpoint's.
        backend: which of OpenAI's APIs it is.
        model: its name there.
        api_key: sent as bearer; None sends none.
        fields: of every body, besides the prompt and the length.
    """

    url: str
    backend: Backend
    model: str
    api_key: str | None
    fields: Mapping[str, Any]

    def body(self, work: Work) -> bytes:
        prompt: dict[str, Any] = {"prompt": work.prompt}
        if self.backend == "chat":
            prompt = {"messages": [{"role": "user", "content": work.prompt}]}
        common = {"model": self.model, "max_tokens": work.output_len, "stream": True}
        return msgspec.json.encode({**common, **prompt, "stream_options": {"include_usage": True}, **self.fields})

    def headers(self) -> dict[str, str]:
        key = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        # Bodies are read as they come: a proxy that compresses would else send what no event can be found in.
        return {"Content-Type": "application/json", "Accept-Encoding": "identity", **key}


def new_session(target: Target) -> aiohttp.ClientSession:
    """Connections without bound, in number and in time."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
        headers=target.headers(),
        auto_decompress=False,
    )


async def send(session: aiohttp.ClientSession, target: Target, record: Record) -> None:
    """Sends a request and notes in its record what comes. A failure is noted too, not raised."""
    body = target.body(record.work)
    reader = EventReader(record)
    record.sent = time.perf_counter()
    try:
        async with session.post(target.url, data=body) as response:
            if response.status != 200:
                record.error = f"status {response.status}: {_shown(await response.read())}"
                return
            async for piece in response.content.iter_any():
                reader.take(piece, time.perf_counter())
    except (aiohttp.ClientError, OSError) as error:
        record.error = record.error or f"{type(error).__name__}: {error}"
    reader.finish()


class EventReader:
    """Server-sent events, cut anywhere, → times and counts of a record."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._rest = b""
        self._usage: _Usage | None = None

    def take(self, piece: bytes, now: float) -> None:
        """A piece of the body that came at `now`."""
        *lines, self._rest = (self._rest + piece).split(b"\n") if self._rest else piece.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take_data(line[5:].strip(), now)

    def _take_data(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            return
        try:
            event = _DECODER.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._record.error = f"an event is none of OpenAI's: {_shown(data)}"
            return
        if bytes(event.error) not in (b"", b"null"):
            self._record.error = f"error in the stream: {_shown(bytes(event.error))}"
        self._usage = event.usage or self._usage
        if any(_has_news(choice) for choice in event.choices):
            self._record.times.append(now)

    def finish(self) -> None:
        """At the end of the body: token counts, and whether there was an answer at all."""
        record, usage = self._record, self._usage
        record.prompt_tokens = usage.prompt_tokens if usage else record.work.prompt_len
        record.output_tokens = usage.completion_tokens if usage else len(record.times)
        if not record.times and not record.error:
            record.error = "the answer has no text"


def _has_news(choice: _Choice) -> bool:
    delta = choice.delta
    if delta is None:
        return bool(choice.text)
    has_call = bytes(delta.tool_calls) not in (b"", b"null", b"[]")
    return bool(delta.content or delta.reasoning_content or delta.reasoning) or has_call


def _shown(body: bytes) -> str:
    text = body.decode("utf-8", "replace").strip()
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " …"

"""Answers OpenAI's batch files in this process: the same bodies, checks and answers as over HTTP, without any.

So many lines are in work at once as there are tasks; each takes the next line, has it answered and writes the output
line. Output lines come in the order in which answers are ready.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import msgspec

from folovllm.common.errors import EngineError, FoloVLLMError, QueueFullError
from folovllm.common.log import get_logger
from folovllm.frontend.server.batch_lines import Line, LineReader
from folovllm.frontend.server.context import ServerContext
from folovllm.frontend.server.endpoints.chat import ChatCompletions
from folovllm.frontend.server.endpoints.completions import Completions
from folovllm.frontend.server.errors import ApiError, error_body, to_api_error
from folovllm.frontend.server.protocol.batch import BatchError, BatchLine, BatchOutput, BatchResponse

logger = get_logger(__name__)

_OK: Final = 200
Complete = Callable[[bytes, str], Awaitable[msgspec.Struct]]


@dataclass(slots=True)
class BatchCounts:
    """Lines so far: answered; refused, or failed, with an answer that says so; no request at all; passed over."""

    answered: int = 0
    failed: int = 0
    invalid: int = 0
    skipped: int = 0


class Batch:
    """One run over a file.

    Attributes:
        counts: lines so far.
    """

    def __init__(self, context: ServerContext, lines: LineReader, sink: BinaryIO, done: frozenset[str]) -> None:
        """Args:
        context: of a server that does not serve.
        lines: the input.
        sink: takes the output.
        done: custom ids that are passed over.
        """
        chat, completions = ChatCompletions(context), Completions(context)
        self._endpoints: dict[str, Complete] = {
            "/v1/chat/completions": chat.complete,
            "/v1/completions": completions.complete,
        }
        self._lines = lines
        self._sink = sink
        self._done = done
        self.counts = BatchCounts()

    async def run(self, max_in_work: int, on_line: Callable[[], None]) -> None:
        """Answers all lines, `max_in_work` at a time; `on_line` is called after each.

        Raises:
            EngineError: the engine ended; what was answered is written.
        """
        tasks = [asyncio.ensure_future(self._work(on_line)) for _ in range(max_in_work)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, on_line: Callable[[], None]) -> None:
        while (line := await self._lines.next()) is not None:
            output = await self._answer(line)
            if output is not None:
                self._sink.write(msgspec.json.encode(output) + b"\n")
                self._sink.flush()
            on_line()

    async def _answer(self, line: Line) -> BatchOutput | None:
        name = f"batch_req_{uuid.uuid4().hex}"
        request = self._read(line)
        if isinstance(request, BatchOutput):
            self.counts.invalid += 1
            return request
        if request.custom_id in self._done:
            self.counts.skipped += 1
            return None
        try:
            answer = await _when_there_is_room(self._endpoints[request.url], bytes(request.body), name)
            response = BatchResponse(status_code=_OK, request_id=name, body=msgspec.Raw(msgspec.json.encode(answer)))
            self.counts.answered += 1
        except EngineError:
            raise
        except (ApiError, FoloVLLMError) as error:
            response = self._refusal(to_api_error(error), name)
        except Exception as error:
            logger.exception("an error that nobody foresaw, in the answer to %s", name)
            response = self._refusal(to_api_error(error), name)
        return BatchOutput(id=name, custom_id=request.custom_id, response=response)

    def _refusal(self, error: ApiError, name: str) -> BatchResponse:
        self.counts.failed += 1
        return BatchResponse(status_code=error.status, request_id=name, body=msgspec.Raw(error_body(error, "")))

    def _read(self, line: Line) -> BatchLine | BatchOutput:
        """A line's request, or what the output says of a line that is none."""
        if line.data is None:
            return _no_request(line, None, "invalid_json_line", "it is longer than --max-body-mb allows")
        try:
            request = msgspec.json.decode(line.data, type=BatchLine)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return _no_request(line, _custom_id(line.data), "invalid_json_line", str(error)[:200])
        if request.method != "POST":
            return _no_request(line, request.custom_id, "invalid_method", f"method {request.method[:50]!r} is not POST")
        if request.url not in self._endpoints:
            known = " or ".join(self._endpoints)
            return _no_request(line, request.custom_id, "invalid_url", f"url {request.url[:200]!r} is not {known}")
        return request


async def _when_there_is_room(complete: Complete, body: bytes, name: str) -> msgspec.Struct:
    """The answer; where others fill the engine's queue, as soon as it says that there is room."""
    while True:
        try:
            return await complete(body, name)
        except QueueFullError as error:
            await asyncio.sleep(error.retry_after_s)


def _no_request(line: Line, custom_id: Any, code: str, message: str) -> BatchOutput:
    error = BatchError(code=code, message=f"line {line.number}: {message}")
    return BatchOutput(id=f"batch_req_{uuid.uuid4().hex}", custom_id=custom_id, error=error)


class _Named(msgspec.Struct):
    custom_id: Any = None


def _custom_id(data: bytes) -> Any:
    """What a line that is no request calls itself, so that its writer can find it."""
    try:
        custom_id = msgspec.json.decode(data, type=_Named).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return custom_id if isinstance(custom_id, str | int | float) else None

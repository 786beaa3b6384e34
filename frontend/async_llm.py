"""`AsyncLLM`: the public API for asyncio; any number of requests at once over one connection.

The event loop watches the connection's descriptors; what comes wakes the requests that it is for, and each takes what
is new for it when its consumer asks: a slow consumer gets fewer, longer outputs and holds nobody up.
"""

import asyncio
import os
import time
import weakref
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import TypeVar, Unpack

from folovllm.common.errors import EngineDeadError, FoloVLLMError, ProtocolError, RequestError
from folovllm.common.messages.frontend_core import EngineCoreOutputs, EngineSnapshot, EngineStats, Welcome
from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend.chat_request import ChatOptions, Conversation, render
from folovllm.frontend.engine_options import EngineOptions, check_names
from folovllm.frontend.engine_process import close_in_owner
from folovllm.frontend.input_processor import Request
from folovllm.frontend.opening import open_engine
from folovllm.frontend.output_processor import RequestState
from folovllm.frontend.outputs import RequestOutput
from folovllm.frontend.prompts import Prompt, RenderedChat
from folovllm.frontend.startup_table import StartupReport
from folovllm.frontend.tokenizer import Tokenizer

_STATS_TIMEOUT_S = 10.0  # as in `llm`
Answer = TypeVar("Answer", EngineStats, EngineSnapshot)

_STEPS_AT_ONCE = 8  # messages that are taken in before consumers get their turn


class AsyncLLM:
    """A model that answers prompts from asyncio code; like `LLM`, it starts an engine of its own or uses a running one.

    The constructor blocks until the engine is ready; in a loop that already serves others, call it through
    `asyncio.to_thread`. The requests of one AsyncLLM all belong to one event loop at a time.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        engine: str | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Starts or dials the engine; arguments and errors are those of `LLM`."""
        check_names(options, "AsyncLLM")
        self._open = open_engine(model, tokenizer, engine, options)
        self._finalizer = weakref.finalize(self, close_in_owner, self._open, os.getpid())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: FoloVLLMError | None = None
        self._states: list[RequestState] = []  # in the order of arrival
        self._receives_soon = False
        self._next_id = 0
        self._next_ticket = 0
        self._questions: dict[int, asyncio.Future[EngineStats | EngineSnapshot]] = {}

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine if it is its own, else hangs up; requests in work raise EngineDeadError. May be repeated."""
        if self._loop is not None:
            self._unwatch(self._loop)
        self._fail(EngineDeadError("this AsyncLLM was closed"))
        self._finalizer()

    @property
    def startup(self) -> StartupReport:
        """Seconds per phase and bytes per purpose of the start."""
        return self._open.startup

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises RequestError where the model has none."""
        if self._open.tokenizer is None:
            raise RequestError("this model has no tokenizer")
        return self._open.tokenizer

    @property
    def info(self) -> Welcome:
        """What the engine said about itself: its model's folder, the longest prompt and answer, and so on."""
        return self._open.client.welcome

    @property
    def failure(self) -> FoloVLLMError | None:
        """What ended the engine, or `close`; None while it serves."""
        return self._failure

    def render_chat(self, messages: Conversation, **template: Unpack[ChatOptions]) -> RenderedChat:
        """The prompt that `chat` makes of a conversation, for `generate`. Raises RequestError."""
        return render(self._open.chat, messages, template)

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without `sampling_params` uses: the model's generation_config.json, else neutral values."""
        return self._open.defaults.sampling_params()

    async def get_stats(self) -> EngineStats:
        """The engine's state now. Raises EngineDeadError if it has ended or does not answer within 10 seconds."""
        return await self._ask(self._open.client.ask_stats, EngineStats)

    async def snapshot(self) -> EngineSnapshot:
        """The engine from inside: requests, last steps, blocks; no token, no text. Raises as `get_stats`."""
        return await self._ask(self._open.client.ask_snapshot, EngineSnapshot)

    async def reset_prefix_cache(self) -> bool:
        """As `LLM.reset_prefix_cache`."""
        return (await self._ask(self._open.client.reset_prefix_cache, EngineStats)).num_cached_blocks == 0

    async def _ask(self, send: Callable[[int], None], kind: type[Answer]) -> Answer:
        """Sends a question with a ticket and waits for the answer that echoes it."""
        loop = self._attach()
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        future: asyncio.Future[EngineStats | EngineSnapshot] = loop.create_future()
        self._questions[ticket] = future
        try:
            send(ticket)
            self._receive_soon(loop)
            answer = await asyncio.wait_for(future, _STATS_TIMEOUT_S)
        except TimeoutError as error:
            raise EngineDeadError(f"the engine did not answer within {_STATS_TIMEOUT_S:g} s") from error
        finally:
            del self._questions[ticket]
        assert isinstance(answer, kind), "tickets are not used twice"
        return answer

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answers one prompt bit by bit. A consumer that is cancelled, or closes the generator, aborts the request.

        Args:
            prompt: as for `LLM.generate`, but one.
            sampling_params: None takes the model's defaults.
            request_id: name of the request for logs, output and `abort`; need not be unique. None takes a number.
            priority: lower runs first where the scheduling policy is "priority".

        Yields:
            Outputs whose `outputs` hold what is new; texts and token ids join to the whole. The last has `finished`.

        Raises:
            RequestError, QueueFullError, RequestFailedError, EngineDeadError: as `LLM.generate`, but of this request.
        """
        loop = self._attach()
        name = str(self._next_id) if request_id is None else request_id
        self._next_id += 1
        request = self._open.inputs.process(prompt, sampling_params, request_id=name, priority=priority)
        news = News(loop)
        state = self._send(loop, request, news)
        try:
            while True:
                await news.take()
                output = state.take_delta()
                if output is not None:
                    yield output
                    if output.finished:
                        return
                elif state.finished:
                    return
        finally:
            self._states.remove(state)
            self._abort(loop, self._open.outputs.forget(state))

    async def chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        **template: Unpack[ChatOptions],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answers one conversation bit by bit; `template` as for `LLM.chat`, the rest as for `generate`."""
        prompt = render(self._open.chat, messages, template)
        outputs = self.generate(prompt, sampling_params, request_id=request_id, priority=priority)
        try:
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()

    async def abort(self, request_id: str) -> bool:
        """Ends the oldest request in work of that name; its generator yields a last output, finish_reason "abort".

        Returns:
            Whether there was one. A name that several requests have ends one of them for each call.
        """
        loop = self._attach()
        for state in self._states:
            if state.request.request_id == request_id and not state.finished:
                self._abort(loop, self._open.outputs.end_locally(state, "abort", time.monotonic()))
                return True
        return False

    def _attach(self) -> asyncio.AbstractEventLoop:
        """The running loop, which from the first call on watches the connection."""
        if self._failure is not None:
            raise self._failure
        loop = asyncio.get_running_loop()
        if self._loop is None or self._loop.is_closed():
            self._loop, self._receives_soon = loop, False
            for descriptor in self._open.client.descriptors:
                loop.add_reader(descriptor, self._receive)
        if self._loop is not loop:
            raise RuntimeError("this AsyncLLM is in use by another event loop")
        return loop

    def _unwatch(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = None
        if not loop.is_closed():
            for descriptor in self._open.client.descriptors:
                loop.remove_reader(descriptor)

    def _send(self, loop: asyncio.AbstractEventLoop, request: Request, news: "News") -> RequestState:
        outputs, client = self._open.outputs, self._open.client
        number = client.allocate(request.params.n, outputs.live)
        state = outputs.add(request, number, stream=True, now=time.monotonic(), on_news=news.tell)
        self._states.append(state)
        try:
            if not state.finished:
                client.add([request.for_core(number, stream=True)])
                self._receive_soon(loop)
        except BaseException:  # it cannot be written down, or the connection is closed
            self._states.remove(state)
            outputs.forget(state)
            raise
        return state

    def _abort(self, loop: asyncio.AbstractEventLoop, numbers: list[int]) -> None:
        if numbers and self._failure is None:
            self._open.client.abort(numbers)
            if not loop.is_closed():
                self._receive_soon(loop)

    def _receive_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """After each send, which can swallow a descriptor's news."""
        if not self._receives_soon:
            self._receives_soon = True
            loop.call_soon(self._receive)

    def _receive(self) -> None:
        """Takes in what is there, some steps at a time, so that consumers get their turn while the engine sends."""
        self._receives_soon = False
        if self._failure is not None:
            return
        try:
            messages = self._open.client.receive_ready(_STEPS_AT_ONCE)
            if len(messages) == _STEPS_AT_ONCE and self._loop is not None:
                self._receive_soon(self._loop)
            for message in messages:
                if isinstance(message, EngineCoreOutputs):
                    _, to_abort = self._open.outputs.process(message, time.monotonic())
                    self._open.client.abort(to_abort)
                elif message.ticket in self._questions and not self._questions[message.ticket].done():
                    self._questions[message.ticket].set_result(message)
        except ProtocolError as error:
            self._hang_up(self._open.client.give_up(error))
        except FoloVLLMError as error:
            self._hang_up(error)

    def _hang_up(self, error: FoloVLLMError) -> None:
        """The link is of no more use; an engine that still runs drops the requests of this frontend."""
        if self._loop is not None:
            self._unwatch(self._loop)
        self._open.client.close()
        self._fail(error)

    def _fail(self, error: FoloVLLMError) -> None:
        """From now on every call raises `error`, and so do those in work."""
        self._failure = self._failure or error
        self._open.outputs.fail_all(self._failure)
        for future in self._questions.values():
            if not future.done():
                future.set_exception(self._failure)


class News:
    """Whether a request has something to take, for the one who takes it. A future is made only where he has to wait."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._is_there = True  # a request may be finished from the beginning
        self._waiter: asyncio.Future[None] | None = None

    def tell(self) -> None:
        """There is something new."""
        self._is_there = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> None:
        """Waits until there is something new; from then on, only what comes later is new."""
        if not self._is_there:
            self._waiter = self._loop.create_future()
            await self._waiter
            self._waiter = None
        self._is_there = False

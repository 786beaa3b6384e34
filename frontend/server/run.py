"""Runs one server process: the application on uvicorn, until a signal, or the engine's end, ends it.

The first signal drains: no new connection, no new request; those in work go on for `drain_timeout_s`, then their
answers end with finish_reason "abort". A second one cuts that short. When all is done the signal is raised again, so
that the exit code tells it.
"""

import asyncio
import contextlib
import gc
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
import uvloop

from folovllm.common.errors import ConfigError
from folovllm.common.log import get_logger
from folovllm.frontend.async_llm import AsyncLLM
from folovllm.frontend.server.app import build_app
from folovllm.frontend.server.context import ServerContext
from folovllm.frontend.server.heartbeat import Heartbeat
from folovllm.frontend.server.options import ServerOptions

logger = get_logger(__name__)

_ENDING_S = 5  # what aborted streams get to write their ends
_KEEP_ALIVE_S = 75  # longer than load balancers keep idle connections (60 s), so that they close first
_BACKLOG = 2048


def listen(options: ServerOptions) -> socket.socket:
    """The bound socket of `host` and `port`; it listens once the server runs. Several processes may share the port.

    Raises:
        ConfigError: the address cannot be used. This is told before a model is loaded.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host or None, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if options.api_server_count > 1:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            made.bind(address)
        except OSError:
            made.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {options.host}:{options.port}: {error.strerror or error}") from error
    return made


def url_of(options: ServerOptions, bound: socket.socket) -> str:
    """Where a client finds the server."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{'https' if options.ssl_certfile else 'http'}://{host}:{port}{options.root_path}"


def serve(
    llm: AsyncLLM,
    options: ServerOptions,
    bound: socket.socket,
    *,
    on_ready: Callable[[], None],
    stop_fd: int | None = None,
) -> None:
    """Serves `llm` on a bound socket until a signal comes, or `stop_fd` becomes readable, and all is drained.

    Args:
        llm: the engine; the caller closes it.
        options: of the server.
        bound: from `listen`; closed at the end.
        on_ready: called when requests are served.
        stop_fd: asks for the end like a signal.

    Raises:
        ConfigError: an option does not fit the model, or a certificate cannot be read.
        FoloVLLMError: the engine ended; requests in work have had this error.
    """
    app = build_app(llm, options)
    context: ServerContext = app.state.context
    config = uvicorn.Config(
        app,
        http="httptools",
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        root_path=options.root_path,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(options.drain_timeout_s) + _ENDING_S,
        ssl_certfile=options.ssl_certfile or None,
        ssl_keyfile=options.ssl_keyfile or None,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"ssl_certfile and ssl_keyfile cannot be used: {error}") from error
    server = _Server(config, context, on_ready)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if stop_fd is not None:
            _drain_on(runner.get_loop(), stop_fd, server)
        runner.run(server.serve(sockets=[bound]))
    if context.spans is not None:
        context.spans.close()
    if server.first_signal is not None:
        signal.raise_signal(server.first_signal)
    if llm.failure is not None:
        raise llm.failure


def _drain_on(loop: asyncio.AbstractEventLoop, stop_fd: int, server: "_Server") -> None:
    """The descriptor stays readable, so it is looked at once."""

    def stop() -> None:
        loop.remove_reader(stop_fd)
        server.drain()

    loop.add_reader(stop_fd, stop)


class _Server(uvicorn.Server):
    """uvicorn's server, that drains, and ends with its engine.

    Attributes:
        first_signal: the one that asked for the end, None for none.
    """

    def __init__(self, config: uvicorn.Config, context: ServerContext, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._context = context
        self._on_ready = on_ready
        self.first_signal: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self._context.llm.get_stats()  # the loop watches the engine from here on
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # what is there now stays, so collections leave it out: 8 % of a token's Python, measured alone
        self._heartbeat = asyncio.ensure_future(Heartbeat(self._context).run())
        self._on_ready()

    def drain(self) -> None:
        """Asks for the end; asked again, it does not wait any longer."""
        self.force_exit = self.should_exit
        self.should_exit = self._context.draining = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, it raises no signal again: that would be within the loop, whose tasks it would leave."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the form of a handler
        self.first_signal = self.first_signal or sig
        self.drain()

    async def on_tick(self, counter: int) -> bool:
        if self._context.llm.failure is not None:
            self.should_exit = self._context.draining = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logger.info("draining: %d requests in work", self._context.num_active)
        limit = asyncio.ensure_future(self._abort_later())
        try:
            await super().shutdown(sockets)
        finally:
            limit.cancel()
            self._heartbeat.cancel()
            await asyncio.gather(limit, self._heartbeat, return_exceptions=True)

    async def _abort_later(self) -> None:
        await asyncio.sleep(self._context.options.drain_timeout_s)
        logger.warning("drain timeout: %d requests are aborted", self._context.num_active)
        await self._context.abort_all()

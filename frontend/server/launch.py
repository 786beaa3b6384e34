"""From the command line to a server that runs: the port first, then the engine, then one process or several.

The port comes first because a model can take minutes to load, and a port in use is better told before.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass

from folovllm.common.errors import ConfigError
from folovllm.common.log import setup_logging
from folovllm.frontend.async_llm import AsyncLLM
from folovllm.frontend.engine_options import EngineOptions
from folovllm.frontend.engine_process import EngineProcess
from folovllm.frontend.model_hub import resolve
from folovllm.frontend.opening import start_engine
from folovllm.frontend.server.group import ServerGroup
from folovllm.frontend.server.options import ServerOptions
from folovllm.frontend.server.run import listen, serve, url_of
from folovllm.frontend.startup_table import Stopwatch

OnReady = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class EngineSource:
    """Which engine is served.

    Attributes:
        model: of an engine to be started; None: `engine` is dialled.
        engine: endpoint of a running engine.
        tokenizer: as for AsyncLLM.
        options: of the engine to be started; `log_level` is the server's too.
    """

    model: str | None
    engine: str | None
    tokenizer: str | None
    options: EngineOptions


def launch(source: EngineSource, options: ServerOptions, on_ready: OnReady) -> None:
    """Serves until a signal, or a fault, ends it.

    Args:
        source: the engine.
        options: of the server.
        on_ready: called with the server's URL and the start-up table ("" where no engine was started).

    Raises:
        FoloVLLMError: the port, an option or the model cannot be used, or the engine ended.
    """
    bound = listen(options)
    try:
        url = url_of(options, bound)
        if options.api_server_count == 1:
            _serve_alone(source, options, bound, lambda table: on_ready(url, table))
        else:
            _serve_in_group(source, options, bound, lambda table: on_ready(url, table))
    finally:
        bound.close()


def _serve_alone(
    source: EngineSource, options: ServerOptions, bound: socket.socket, on_ready: Callable[[str], None]
) -> None:
    llm = AsyncLLM(source.model, tokenizer=source.tokenizer, engine=source.engine, **source.options)
    try:
        table = "" if source.model is None else llm.startup.table()
        serve(llm, options, bound, on_ready=lambda: on_ready(table))
    finally:
        llm.close()


def _serve_in_group(
    source: EngineSource, options: ServerOptions, bound: socket.socket, on_ready: Callable[[str], None]
) -> None:
    level = source.options.get("log_level") or "info"
    setup_logging("server", level)
    if source.engine is not None:
        given = sorted(set(source.options) - {"log_level"})
        if given:
            raise ConfigError(f"{', '.join(given)} cannot be given with engine={source.engine}: it is started already")
        _run_group(
            ServerGroup(options, bound, source.engine, tokenizer=source.tokenizer, log_level=level), "", on_ready
        )
        return
    assert source.model is not None, "the command line asks for one of the two"
    watch = Stopwatch()
    with watch.phase("find model"):
        folder = resolve(source.model)
    started = start_engine(folder, source.tokenizer, source.options, watch=watch)
    try:
        table = watch.report(started.ready.phases, started.ready.memory).table()
        endpoint = started.ready.endpoint
        group = ServerGroup(options, bound, endpoint, tokenizer=source.tokenizer, log_level=level)
        _run_group(group, table, on_ready, started.process)
    finally:
        started.process.stop()


def _run_group(
    group: ServerGroup, table: str, on_ready: Callable[[str], None], engine: EngineProcess | None = None
) -> None:
    try:
        group.run(engine, lambda: on_ready(table))
    finally:
        group.close()

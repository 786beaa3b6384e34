"""`folovllm engine`: an engine that any number of frontends dial and leave."""

import signal
from typing import TYPE_CHECKING, Any

import click

from folovllm.frontend.cli.options import GroupedCommand, complete_model, engine_options, option, taken_engine_options
from folovllm.frontend.cli.stop_signals import exit_in_order

if TYPE_CHECKING:
    from folovllm.frontend.opening import StartedEngine

_EXAMPLES = (
    "folovllm engine demo --listen ipc:///tmp/engine.sock",
    "folovllm engine Qwen/Qwen3-0.6B --listen tcp://127.0.0.1:5555",
    "folovllm chat --engine ipc:///tmp/engine.sock",
)


@click.command(cls=GroupedCommand, examples=_EXAMPLES, short_help="Starts an engine that others dial.")
@click.argument("model", shell_complete=complete_model)
@option("Connection", "--listen", required=True, metavar="ENDPOINT", help="ipc://PATH, or tcp://HOST:PORT (encrypted).")
@engine_options
def engine(model: str, listen: str, **given: Any) -> None:
    """Starts an engine for MODEL and serves frontends until SIGINT or SIGTERM.

    Frontends dial ENDPOINT: LLM(engine=ENDPOINT), AsyncLLM(engine=ENDPOINT), folovllm chat --engine ENDPOINT. A tcp
    endpoint is encrypted; ENDPOINT?key=FILE names its key file, without which the one in the cache folder is used.
    """
    exit_in_order(signal.SIGINT, signal.SIGTERM)
    started = _start(model, listen, given)
    try:
        click.echo(started.watch.report(started.ready.phases, started.ready.memory).table())
        click.echo(f"\nready; connect with LLM(engine={started.ready.endpoint!r})")
        click.echo(f"             or with folovllm chat --engine '{started.ready.endpoint}'")
        started.process.wait_for_end()
        failure = started.process.failure()
        if failure is not None:
            raise failure
    finally:
        started.process.stop()


def _start(model: str, listen: str, given: dict[str, Any]) -> "StartedEngine":
    from folovllm.common.log import setup_logging
    from folovllm.frontend.model_hub import resolve
    from folovllm.frontend.opening import start_engine
    from folovllm.frontend.startup_table import Stopwatch

    options = taken_engine_options(given)
    level = options.setdefault("log_level", "info")
    setup_logging("frontend", level or "info")
    watch = Stopwatch()
    with watch.phase("find model"):
        folder = resolve(model)
    return start_engine(folder, given["tokenizer"], options, watch=watch, listen=listen)

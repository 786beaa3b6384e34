"""`folovllm serve`: the HTTP server."""

import importlib.util
import pathlib
import signal
from typing import TYPE_CHECKING, Any

import click

from folovllm.frontend.cli.options import GroupedCommand, complete_model, engine_options, option, taken_engine_options
from folovllm.frontend.cli.stop_signals import exit_in_order

if TYPE_CHECKING:
    from folovllm.frontend.server.options import ServerOptions

_EXAMPLES = (
    "folovllm serve demo",
    "folovllm serve Qwen/Qwen3-0.6B --host 0.0.0.0 --api-key-file keys.txt",
    "folovllm serve --engine ipc:///tmp/engine.sock --port 9000",
    "folovllm serve demo --api-server-count 4",
)
_SERVER = "Server"
_API = "API"
_SECURITY = "Security"

# (group, option, type, help); None as type is a flag. A test compares them with ServerOptions.
SERVER_OPTIONS: tuple[tuple[str, str, Any, str], ...] = (
    (_SERVER, "host", str, "Address to listen on; 0.0.0.0 is every one [127.0.0.1]."),
    (_SERVER, "port", int, "Port to listen on; 0 lets the system choose [8000]."),
    (_SERVER, "root_path", str, "Path under which a proxy serves this server [none]."),
    (_SERVER, "api_server_count", int, "Server processes on the port, over one engine [1]."),
    (_SERVER, "drain_timeout_s", float, "Seconds that running requests get after SIGTERM [30]."),
    (_SERVER, "health_timeout_s", float, "Seconds after which an engine that does not answer is stuck [5]."),
    (_SERVER, "otlp_traces_endpoint", str, "URL to which OpenTelemetry spans go by OTLP over HTTP [none]."),
    (_API, "lenient", None, "Pass over unknown fields, and list them in the header X-Ignored-Fields [refuse them]."),
    (_API, "max_body_mb", float, "Largest body in MiB [8]."),
    (_API, "stream_interval", int, "Tokens that are gathered before a stream sends them [1]."),
    (_API, "keep_alive_s", float, "Seconds of silence after which a stream sends a comment; 0: never [15]."),
    (_API, "tool_parser", str, "Parser of tool calls, 'auto' or 'none' [auto]."),
    (_API, "reasoning_parser", str, "Parser of reasoning, 'auto' or 'none' [auto]."),
    (_SECURITY, "ssl_certfile", str, "Certificate, a PEM file [plain HTTP]."),
    (_SECURITY, "ssl_keyfile", str, "Its key, a PEM file."),
)


def _server_options(command: Any) -> Any:
    for group, name, kind, text in reversed(SERVER_OPTIONS):
        flag = "--" + name.removesuffix("_s").replace("_", "-")
        if kind is None:
            command = option(group, flag, name, is_flag=True, default=None, help=text)(command)
        else:
            command = option(group, flag, name, type=kind, default=None, help=text)(command)
    return command


@click.command(cls=GroupedCommand, examples=_EXAMPLES, short_help="Serves MODEL over HTTP.")
@click.argument("model", required=False, shell_complete=complete_model)
@option(_SERVER, "--engine", default=None, metavar="ENDPOINT", help="Use a running engine; MODEL is not needed.")
@option(
    _API,
    "--served-model-name",
    "served_model_names",
    multiple=True,
    help="Name that requests ask for; may be given several times [MODEL].",
)
@option(_SECURITY, "--api-key-file", default=None, metavar="FILE", help="API keys, one a line [none: open to all].")
@option(
    _SECURITY,
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Origin whose pages may call; may be given several times; * is any [none].",
)
@option(_SERVER, "--no-access-log", is_flag=True, help="Log no line for each request.")
@_server_options
@engine_options
def serve(model: str | None, engine: str | None, **given: Any) -> None:
    """Serves MODEL with OpenAI's and Anthropic's HTTP APIs until SIGINT or SIGTERM.

    The first signal lets running requests go on for --drain-timeout seconds; a second one does not wait. API keys are
    taken from --api-key-file and from FOLOVLLM_API_KEYS (separated by commas). With a key set, every path but /health
    and /ready asks for one. The documentation of the API is at /docs.
    """
    if (model is None) == (engine is None):
        raise click.UsageError("give either a MODEL (a folder, a hub id or 'demo') or --engine ENDPOINT")
    exit_in_order(signal.SIGINT, signal.SIGTERM)
    need_server_libraries()
    if given["otlp_traces_endpoint"] is not None:
        from folovllm.frontend.server.spans import need_libraries

        need_libraries()  # told before a model is loaded
    from folovllm.frontend.server.launch import EngineSource, launch

    engine_given = taken_engine_options(given)
    engine_given.setdefault("log_level", "info")
    launch(
        EngineSource(model, engine, given["tokenizer"], engine_given),
        _taken_server_options(model, given),
        on_ready=_tell,
    )


def need_server_libraries() -> None:
    """Raises ConfigError where one is not installed."""
    from folovllm.common.errors import ConfigError

    for name in ("starlette", "uvicorn", "uvloop", "httptools", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"{name} is not installed; the server needs the extra of that name: pip install 'folovllm[server]', or "
                "pip install -e '.[server]' in a checkout"
            )


def _taken_server_options(model: str | None, given: dict[str, Any]) -> "ServerOptions":
    """The server's options; only those that the user set differ from the defaults. Raises ConfigError."""
    from folovllm.common.config import api_keys_from_environment
    from folovllm.frontend.server.options import ServerOptions

    values = {name: given[name] for _, name, _, _ in SERVER_OPTIONS if given[name] is not None}
    names = given["served_model_names"] or (() if model is None else (short_name(model),))
    return ServerOptions(
        **values,
        served_model_names=names,
        api_keys=(*api_keys_from_environment(), *_keys_in(given["api_key_file"])),
        cors_origins=given["cors_origins"],
        access_log=not given["no_access_log"],
    )


def short_name(model: str) -> str:
    """The name that requests ask for: a hub id or `demo` as it is, a folder by its own name."""
    path = pathlib.Path(model)
    return path.resolve().name if path.is_dir() else model


def _keys_in(file: str | None) -> list[str]:
    """The keys of a file, one a line; blank lines and those that begin with # are passed over. Raises ConfigError."""
    from folovllm.common.errors import ConfigError

    if file is None:
        return []
    try:
        lines = [line.strip() for line in pathlib.Path(file).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file} cannot be read: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {file} holds no key; without the option the server is open to all")
    return keys


def _tell(url: str, startup: str) -> None:
    if startup:
        click.echo(startup + "\n")
    click.echo(f"ready; {url}/v1 (documentation of the API: {url}/docs)")

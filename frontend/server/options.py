"""The server's options: frozen, checked when they are made."""

import msgspec

from folovllm.common.config import check_flag, check_range
from folovllm.common.errors import ConfigError


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one HTTP server behaves. What concerns the engine is in EngineConfig.

    Attributes:
        served_model_names: names the model is asked for by, the first one in answers; none: the model's own name.
        api_keys: any of them opens every route; none: all routes are open.
        host: address to listen on.
        port: port to listen on; 0 lets the system choose.
        root_path: path under which a proxy serves this server.
        ssl_certfile: certificate, a PEM file; needs the key.
        ssl_keyfile: the certificate's key, a PEM file.
        cors_origins: origins from which browsers may call; "*" is any.
        lenient: unknown fields of a body are passed over, and listed in the header `X-Ignored-Fields`.
        max_body_mb: largest body in MiB; larger ones are refused with 413.
        stream_interval: an answer's tokens are sent when so many are new (the first one, and the last ones, at once).
        keep_alive_s: a stream that has had nothing to say for so long sends a comment; 0 sends none.
        health_timeout_s: how long `/health` waits for the engine.
        drain_timeout_s: how long SIGTERM lets running requests go on.
        access_log: one log line for each request, without its contents.
        tool_parser: name of the parser of tool calls, "auto" (by the model) or "none".
        reasoning_parser: name of the parser of reasoning, "auto" or "none".
        api_server_count: server processes on one port.
        otlp_traces_endpoint: URL to which OpenTelemetry spans go by OTLP over HTTP (extra `otel`); "" makes none.
    """

    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    root_path: str = ""
    ssl_certfile: str = ""
    ssl_keyfile: str = ""
    cors_origins: tuple[str, ...] = ()
    lenient: bool = False
    max_body_mb: float = 8.0
    stream_interval: int = 1
    keep_alive_s: float = 15.0
    health_timeout_s: float = 5.0
    drain_timeout_s: float = 30.0
    access_log: bool = True
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    api_server_count: int = 1
    otlp_traces_endpoint: str = ""

    def __post_init__(self) -> None:
        check_range("port", self.port, 0, 65535)
        check_range("max_body_mb", self.max_body_mb, 0.001, 4096.0)
        check_range("stream_interval", self.stream_interval, 1, 1024)
        check_range("keep_alive_s", self.keep_alive_s, 0.0, 3600.0)
        check_range("health_timeout_s", self.health_timeout_s, 0.01, 3600.0)
        check_range("drain_timeout_s", self.drain_timeout_s, 0.0, 86_400.0)
        check_range("api_server_count", self.api_server_count, 1, 256)
        check_flag("lenient", self.lenient)
        check_flag("access_log", self.access_log)
        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            raise ConfigError("ssl_certfile and ssl_keyfile go together: give both, or none")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"root_path={self.root_path!r} must start with '/' and not end with it")
        if self.otlp_traces_endpoint and not self.otlp_traces_endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"otlp_traces_endpoint={self.otlp_traces_endpoint!r} must be a URL such as http://127.0.0.1:4318/v1/traces"
            )
        if any(not key.strip() or not key.isascii() for key in self.api_keys):
            raise ConfigError("api_keys holds a key that is empty, or has other characters than ASCII")
